// What every part of the page has: values by keyboard, numbers as CSV, tables that sort.
(() => {
  const quoted = (cell) => (/[",\n\r]/.test(String(cell)) ? `"${String(cell).replace(/"/g, '""')}"` : String(cell));
  window.saveCsv = (name, header, rows) => {
    const text = [header, ...rows].map((row) => row.map((cell) => quoted(cell ?? "")).join(",")).join("\n") + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name.replace(/[^\w.-]+/g, "-").slice(0, 80) + ".csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };

  function tool(card, name, numbers) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "tool";
    button.textContent = "CSV";
    button.setAttribute("aria-label", `CSV of ${name}`);
    button.addEventListener("click", () => window.saveCsv(name, ...numbers()));
    card.append(button);
  }
  // The headings that a part stands under tell it from others with the same name.
  function nameOf(part) {
    const own = part.closest(".card").querySelector("h3"), section = part.closest("section").querySelector("h2");
    return [section, own].filter(Boolean).map((heading) => heading.textContent.trim()).join(", ");
  }

  for (const card of document.querySelectorAll("[data-csv]")) {
    const { layers, series } = JSON.parse(card.dataset.csv), names = Object.keys(series);
    tool(card, nameOf(card), () => [["layer", ...names], layers.map((layer, i) => [layer, ...names.map((name) => series[name][i])])]);
  }
  for (const heat of document.querySelectorAll(".heat[data-layers]")) {
    const experts = +heat.dataset.experts, layers = JSON.parse(heat.dataset.layers);
    tool(heat.closest(".card"), nameOf(heat), () => {
      const values = [...heat.querySelectorAll("i")].map((cell) => cell.dataset.v);
      return [["layer", ...Array.from({ length: experts }, (_, e) => `expert ${e}`)], layers.map((layer, i) => [layer, ...values.slice(i * experts, (i + 1) * experts)])];
    });
  }
  const together = document.getElementById("together");
  if (together) tool(together.closest(".card"), "Experts chosen together", () => {
    const row = window.together();
    return [["expert", "with", "share of tokens", "by chance"], row.matrix.flatMap((shares, i) => shares.map((share, j) => [i, j, share, row.expected[i][j]])).filter(([i, j]) => i !== j)];
  });

  // Arrow keys go from value to value.
  function walk(box, columns) {
    box.tabIndex = 0;
    let at = null;
    const items = () => [...box.querySelectorAll("[data-v], [data-tip]")];
    const go = (item) => {
      for (const one of box.querySelectorAll(".at")) one.classList.remove("at");
      item.classList.add("at");
      at = item;
      item.scrollIntoView({ block: "nearest", inline: "nearest" });
      window.showTip(item);
    };
    box.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() };
      if (event.key === "Enter" && at) at.dispatchEvent(new MouseEvent("click", { bubbles: true }));
      else if (!steps[event.key]) return;
      else {
        const all = items(), now = all.indexOf(at);
        go(all[now < 0 ? 0 : Math.max(0, Math.min(all.length - 1, now + steps[event.key]))]);
      }
      event.preventDefault();
    });
    box.addEventListener("blur", () => { for (const one of box.querySelectorAll(".at")) one.classList.remove("at"); });
  }
  for (const heat of document.querySelectorAll(".heat")) {
    if (!heat.hasAttribute("role")) { heat.setAttribute("role", "group"); heat.setAttribute("aria-label", `${nameOf(heat)}: values by arrow keys`); }
    walk(heat, () => (heat.id === "together" ? +getComputedStyle(heat).getPropertyValue("--columns") - 1 : +getComputedStyle(heat).getPropertyValue("--columns")));
  }
  for (const svg of document.querySelectorAll("svg")) {
    if (svg.querySelector("[data-tip]")) { svg.setAttribute("role", "group"); walk(svg, () => 1); }
  }
  for (const text of document.querySelectorAll(".text")) walk(text, () => 10);

  const value = (cell) => {
    const text = cell ? cell.textContent.trim() : "", parsed = parseFloat(text.replace("−", "-"));
    return text === "–" ? -Infinity : Number.isNaN(parsed) || !/^[-+−\d.]/.test(text) ? text : parsed;
  };
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.querySelectorAll("th")];
    if (!heads.length) continue;
    tool(table.closest(".card"), nameOf(table), () => [heads.map((head) => head.textContent.trim()), [...table.rows].slice(1).map((row) => [...row.cells].map((cell) => cell.textContent.trim()))]);
    heads.forEach((head, column) => {
      head.tabIndex = 0;
      head.setAttribute("aria-sort", "none");
      const sort = () => {
        const up = head.getAttribute("aria-sort") !== "ascending", rows = [...table.rows].slice(1);
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const order = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1);
        rows.sort((a, b) => order(value(a.cells[column]), value(b.cells[column])) * (up ? 1 : -1));
        table.tBodies[0].append(...rows);
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { sort(); event.preventDefault(); } });
    });
  }
})();
