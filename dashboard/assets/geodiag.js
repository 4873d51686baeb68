// Code in the browser: the tick (off in hidden tabs), light or dark, cells of the tables.

window.dash_clientside = window.dash_clientside || {};
window.dash_clientside.geodiag = {
  tick: (n) => (document.hidden || !n ? window.dash_clientside.no_update : n),

  // First call: follow the system unless a cookie has the choice. Later calls: the button.
  theme: (clicks, now, known) => {
    const keep = [window.dash_clientside.no_update, window.dash_clientside.no_update];
    let next = now === "dark" ? "light" : "dark";
    if (!clicks) {
      const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      if (known || system === now) return keep;
      next = system;
    }
    document.cookie = `geodiag-theme=${next}; path=/; max-age=31536000; SameSite=Strict`;
    return [next, next];
  },
};

const cells = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
const el = (...args) => React.createElement(...args);

cells.RunLink = (p) => el("a", { href: `/run/${encodeURIComponent(p.value)}/overview`, className: "run-link" }, p.value);

cells.Status = (p) => el("span", { className: `badge badge-${p.value}` }, el("span", { className: "dot" }), p.value);

cells.Kind = (p) => el("span", { className: `kind kind-${p.value}` }, p.value);

cells.Spark = (p) => {
  const known = (p.value || []).map((y, i) => [i, y]).filter(([, y]) => y !== null);
  if (known.length < 2) return "–";
  const [w, h, pad] = [104, 26, 3];
  const ys = known.map(([, y]) => y);
  const [low, high] = [Math.min(...ys), Math.max(...ys)];
  const x = (i) => pad + (i / (p.value.length - 1)) * (w - 2 * pad);
  const y = (v) => pad + (1 - (v - low) / (high - low || 1)) * (h - 2 * pad);
  const d = known.map(([i, v], k) => `${k ? "L" : "M"}${x(i).toFixed(1)},${y(v).toFixed(1)}`).join("");
  const label = `loss from ${ys[0]} to ${ys[ys.length - 1]}`;
  return el(
    "svg",
    { width: w, height: h, role: "img", "aria-label": label, className: "spark" },
    el("path", { d, fill: "none", stroke: "currentColor", strokeWidth: 1.4, strokeLinejoin: "round" }),
  );
};
