"use strict";
// The token explorer: spans of text, coloured by the chosen view; one note tells of the token under the pointer.
(() => {
  const panes = (JSON.parse(document.getElementById("data").textContent) || {}).explorer;
  if (!panes) return;
  const select = document.getElementById("explorer-view"), written = document.getElementById("explorer-values");
  const key = document.getElementById("explorer-key"), note = document.getElementById("explorer-told");
  const host = document.getElementById("explorer-panes");
  // Okabe and Ito's colours, pale enough for dark text; beyond eight, values repeat a colour and differ by what is written.
  const palette = ["#8ec3e6", "#f2c568", "#7fd0b5", "#e8b9d4", "#b9e0f7", "#f0a97a", "#cfcfcf", "#f5ee9a"];
  const scale = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"];  // viridis

  const shown = (text) => text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥\t");
  const spans = panes.map((pane) => {
    const box = document.createElement("div"), title = document.createElement("h3");
    title.textContent = pane.run;
    box.append(title);
    let token = 0;
    const found = [];
    pane.rows.forEach((length, row) => {
      const label = document.createElement("p"), text = document.createElement("div");
      label.className = "faint";
      label.textContent = `row ${row}` + (pane.sources[row] ? ` · ${pane.sources[row]}` : "");
      text.className = "passage";
      for (let i = 0; i < length; i++, token++) {
        const span = document.createElement("span");
        span.textContent = shown(pane.texts[token]);
        span.dataset.token = token;
        text.append(span);
        found.push(span);
      }
      box.append(label, text);
    });
    const tell = (event) => {
      const span = event.target.closest("span[data-token]");
      if (span) note.textContent = describe(pane, Number(span.dataset.token));
    };
    box.addEventListener("pointerover", tell);
    box.addEventListener("click", tell);
    host.append(box);
    return found;
  });

  function describe(pane, token) {
    const parts = pane.views.map((view) => {
      const value = view.told ? view.told[token] : view.values[token];
      return `${view.name} ${value === null || value === undefined ? "–" : value}`;
    });
    return `${panes.length > 1 ? pane.run + " · " : ""}${JSON.stringify(pane.texts[token])} — ${parts.join(" · ")}`;
  }

  function colours(view, low, high) {
    if (view.kind === "category") return view.values.map((v) => (v === null || v < 0 ? null : palette[v % palette.length]));
    return view.values.map((v) => {
      if (v === null) return null;
      const at = high > low ? Math.min(Math.max((v - low) / (high - low), 0), 1) : 0;
      return scale[Math.round(at * (scale.length - 1))];
    });
  }

  const dark = new Set(scale.slice(0, 3));
  function draw() {
    const name = select.value;
    const views = panes.map((pane) => pane.views.find((view) => view.name === name));
    const numbers = views.filter((view) => view && view.kind === "number").flatMap((view) => view.values.filter((v) => v !== null));
    numbers.sort((a, b) => a - b);
    const low = numbers[0], high = numbers[Math.floor(0.98 * (numbers.length - 1))];
    key.textContent = numbers.length ? `dark is ${low}, bright ${high} or more` : "one colour a value; beyond eight, colours repeat";
    views.forEach((view, number) => {
      const found = view ? colours(view, low, high) : [], marked = new Set((view && view.marked) || []);
      spans[number].forEach((span, token) => {
        span.style.background = found[token] || "";
        span.style.color = !found[token] ? "" : dark.has(found[token]) ? "#fff" : "#111";
        span.classList.toggle("lost", marked.has(token));
        if (view && written.checked && view.values[token] !== null) span.dataset.value = view.values[token];
        else delete span.dataset.value;
      });
    });
  }

  for (const name of new Set(panes.flatMap((pane) => pane.views.map((view) => view.name)))) {
    select.append(new Option(name, name));
  }
  const expert = [...select.options].find((option) => option.value.endsWith(": expert"));
  if (expert) select.value = expert.value;
  select.addEventListener("change", draw);
  written.addEventListener("change", draw);
  draw();
})();
