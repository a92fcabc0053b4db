"use strict";
// Draws the charts of the page, in the colours of the reader's scheme, and again when that changes.
(() => {
  const stored = (id) => JSON.parse(document.getElementById(id).textContent);
  const sets = stored("data"), specs = stored("specs"), rows = {};

  // A data set is columns, or a grid: every combination of axes, the last one running fastest.
  function rowsOf(name) {
    if (rows[name]) return rows[name];
    const set = sets[name];
    if (!set.axes) {
      const keys = Object.keys(set);
      return (rows[name] = (set[keys[0]] || []).map((_, i) => Object.fromEntries(keys.map((key) => [key, set[key][i]]))));
    }
    const axes = Object.entries(set.axes), found = [];
    set.values.forEach((value, index) => {
      if (value === null) return;
      const row = { [set.value]: value };
      let rest = index;
      for (const [axis, ticks] of axes.slice().reverse()) {
        const place = rest % ticks.length;
        rest = (rest - place) / ticks.length;
        row[axis] = ticks[place];
        for (const [column, values] of Object.entries((set.join || {})[axis] || {})) row[column] = values[place];
      }
      found.push(row);
    });
    return (rows[name] = found);
  }

  function style(dark) {
    const ink = dark ? "#e6e9ed" : "#1b1f24", faint = dark ? "#a3adb8" : "#59636e", line = dark ? "#3a434d" : "#d1d9e0";
    return {
      background: null, font: "system-ui, Liberation Sans, sans-serif", view: { stroke: line },
      title: { color: ink, fontSize: 14, anchor: "start" },
      axis: { labelColor: faint, titleColor: faint, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: "normal" },
      legend: { symbolBaseStrokeColor: ink, labelColor: ink, titleColor: faint, titleFontWeight: "normal" },
    };
  }

  const wants = window.matchMedia("(prefers-color-scheme: dark)");
  async function draw() {
    const printing = window.matchMedia("print").matches;
    let failed = 0;
    for (const figure of document.querySelectorAll("figure > [data-spec]")) {
      const spec = structuredClone(specs[figure.dataset.spec]);
      const name = spec.data && spec.data.name;
      if (name && sets[name]) spec.datasets = { [name]: rowsOf(name) };
      const options = { actions: false, renderer: "svg", config: style(wants.matches && !printing), mode: "vega-lite" };
      try {
        await vegaEmbed(figure, spec, options);
      } catch (error) {
        failed += 1;
        figure.textContent = `This chart could not be drawn: ${error.message}`;
        console.error(error);
      }
    }
    document.documentElement.dataset.drawn = failed ? "failed" : "all";
  }
  wants.addEventListener("change", draw);
  draw();
})();
