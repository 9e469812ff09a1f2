"use strict";
(() => {
  // Where nothing can hover the buttons would stand over the plot for good.
  const config = { responsive: true, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"] };
  const hidden = new WeakMap(); // article -> arms switched off
  const specs = new WeakMap(); // plot -> its figure

  function themed(layout, revision) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: colour("--rule"), linecolor: colour("--rule"), zerolinecolor: colour("--soft") };
    return {
      ...layout,
      uirevision: revision,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 13, color: colour("--ink") },
      hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--soft"), font: { color: colour("--ink"), size: 13 }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--ink") },
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
  }

  function draw(plot) {
    // plotly writes into what it is given, so that every drawing starts from a fresh copy.
    if (!specs.has(plot)) specs.set(plot, plot.parentElement.querySelector("script").textContent);
    const spec = JSON.parse(specs.get(plot));
    const choice = plot.closest(".block").querySelector("select");
    const index = choice ? Number(choice.value) : 0;
    const variant = spec.variants[index] || { data: [] };
    const off = hidden.get(plot.closest("article")) || new Set();
    const data = spec.data.map((trace, i) => ({ ...trace, ...variant.data[i], visible: !off.has(trace.legendgroup) }));
    Plotly.react(plot, data, themed({ ...spec.layout, ...variant.layout }, index), config);
    plot.dataset.drawn = "yes";
  }

  // One plot a turn keeps the page scrolling while the rest are drawn.
  const waiting = [...document.querySelectorAll(".plot")];
  const next = () => {
    if (!waiting.length) return;
    draw(waiting.shift());
    setTimeout(next);
  };
  next();

  document.querySelectorAll("select").forEach((select) => {
    select.addEventListener("change", () => select.closest(".block").querySelectorAll(".plot").forEach(draw));
  });
  document.querySelectorAll(".chips button").forEach((button) => {
    button.addEventListener("click", () => {
      const article = button.closest("article");
      const off = hidden.get(article) || new Set();
      const shown = button.getAttribute("aria-pressed") === "true";
      if (shown) off.add(button.dataset.arm);
      else off.delete(button.dataset.arm);
      hidden.set(article, off);
      button.setAttribute("aria-pressed", String(!shown));
      article.querySelectorAll(".plot[data-drawn]").forEach(draw);
    });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.querySelectorAll(".plot[data-drawn]").forEach(draw));
})();
