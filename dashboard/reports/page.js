// Script of a report: draws the charts, follows light and dark, zooms them together, prints.

(() => {
  const { charts, template, config } = JSON.parse(document.getElementById("data").textContent);
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const PRINTED = 670; // width of a chart on paper, in CSS pixels
  let theme = null;
  let zooming = false;

  const figureOf = (chart) => {
    const { data, layout } = structuredClone(chart.figure);
    if (theme === "dark") {
      for (const [path, value] of chart.dark) {
        const last = path[path.length - 1];
        path.slice(0, -1).reduce((at, key) => at[key], { data, layout })[last] = value;
      }
    }
    return [data, { ...layout, template, uirevision: "kept" }, config];
  };

  const zoomed = (chart, change) => {
    const ends = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    const all = change["xaxis.autorange"];
    if (zooming || !chart.axis || (ends.includes(undefined) && !all)) return;
    const own = (c) => c.figure.layout.xaxis.range;
    zooming = true;
    const moves = charts
      .filter((c) => c.axis === chart.axis && (c !== chart || all))
      .map((c) => Plotly.relayout(c.id, all && !own(c) ? { "xaxis.autorange": true } : { "xaxis.range": all ? own(c).slice() : ends }));
    Promise.all(moves).finally(() => { zooming = false; });
  };

  const draw = (chart) => {
    const place = document.getElementById(chart.id);
    Plotly.react(place, ...figureOf(chart));
    if (chart.drawn) return;
    chart.drawn = true;
    place.on("plotly_relayout", (change) => zoomed(chart, change));
  };

  const applyTheme = (name) => {
    theme = name;
    document.documentElement.dataset.mantineColorScheme = name;
  };

  const follow = () => {
    applyTheme(system.matches ? "dark" : "light");
    charts.filter((c) => c.drawn).forEach(draw);
  };

  window.addEventListener("beforeprint", () => {
    applyTheme("light");
    charts.forEach((c) => { draw(c); Plotly.relayout(c.id, { width: PRINTED }); });
  });
  window.addEventListener("afterprint", () => {
    follow();
    charts.forEach((c) => Plotly.relayout(c.id, { width: null, autosize: true }));
  });
  system.addEventListener("change", follow);
  follow();

  // One chart after another, so that the page can be read and scrolled meanwhile.
  const next = (i) => {
    if (i === charts.length) return document.documentElement.setAttribute("data-drawn", "");
    draw(charts[i]);
    setTimeout(next, 0, i + 1);
  };
  setTimeout(next, 0, 0);
})();
