"use strict";
(() => {
  const compare = (a, b) => a.localeCompare(b, undefined, { numeric: true, sensitivity: "base" });

  // The key of a row in a column: a number where the cell has one, otherwise its text.
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    const order = cell.dataset.order;
    return order === undefined ? cell.textContent.trim() : Number(order);
  };

  const sort = (table, column, ascending) => {
    const body = table.tBodies[0];
    const sign = ascending ? 1 : -1;
    const keyed = Array.from(body.rows, (row) => [keyOf(row, column), row]);
    const missing = ([key]) => key === "" || Number.isNaN(key);
    keyed.sort((left, right) => {
      if (missing(left) || missing(right)) return missing(left) - missing(right);
      const [a, b] = [left[0], right[0]];
      return sign * (typeof a === "number" && typeof b === "number" ? a - b : compare(String(a), String(b)));
    });
    body.append(...keyed.map(([, row]) => row));
  };

  for (const table of document.querySelectorAll("table")) {
    if (table.tBodies[0].rows.length < 2) continue;
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      if (!head.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        // Numbers from the largest down first, texts from A on.
        const first = head.classList.contains("number") ? "descending" : "ascending";
        const now = head.getAttribute("aria-sort");
        const next = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
        heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", next);
        sort(table, column, next === "ascending");
      });
    });
  }

  for (const field of document.querySelectorAll(".search")) {
    const input = field.querySelector("input");
    const table = document.getElementById(input.getAttribute("aria-controls"));
    const rows = Array.from(table.tBodies[0].rows, (row) => [row.textContent.toLowerCase(), row]);
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const [text, row] of rows) {
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      field.querySelector("output").textContent = shown + " of " + rows.length;
    };
    input.addEventListener("input", filter);
    field.hidden = false;
    filter();
  }
})();
