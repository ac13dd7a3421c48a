// What the page of many runs does beyond its links: choose a slice, sort and filter the table.
(function () {
  "use strict";
  function all(selector, root) {
    return Array.prototype.slice.call((root || document).querySelectorAll(selector));
  }

  var select = document.getElementById("slice");
  if (select) {
    var choose = function () {
      all(".slice").forEach(function (part) { part.hidden = part.dataset.slice !== select.value; });
    };
    select.addEventListener("change", choose);
    select.closest(".slicer").hidden = false;
    choose();
  }

  var table = document.getElementById("all-rows");
  var body = table.tBodies[0];
  var rows = all("tr", body);
  var heads = all("thead th[data-sorts]", table);

  function key(row, column) {
    var cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  }
  function compare(a, b) {
    return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true, sensitivity: "base" });
  }
  function sort(head) {
    var down = head.getAttribute("aria-sort") === "ascending";
    var column = head.cellIndex;
    heads.forEach(function (other) { other.setAttribute("aria-sort", "none"); });
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    rows.map(function (row, i) { return { row: row, key: key(row, column), at: i }; })
      .sort(function (a, b) {
        if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.at - b.at; // unknown: last
        return (down ? -1 : 1) * compare(a.key, b.key) || a.at - b.at;
      })
      .forEach(function (entry) { body.append(entry.row); });
  }
  heads.forEach(function (head) {
    var button = document.createElement("button");
    button.type = "button";
    button.append.apply(button, Array.prototype.slice.call(head.childNodes));
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", function () { sort(head); });
  });

  var filter = document.getElementById("filter");
  var shown = document.getElementById("shown");
  var texts = rows.map(function (row) {
    return all("th, td", row).map(function (cell) { return cell.textContent; }).join(" ").toLowerCase();
  });
  function sift() {
    var wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    var count = 0;
    rows.forEach(function (row, i) {
      row.hidden = !wanted.every(function (word) { return texts[i].indexOf(word) >= 0; });
      if (!row.hidden) count += 1;
    });
    shown.textContent = count + " of " + rows.length + (rows.length === 1 ? " row" : " rows");
  }
  filter.addEventListener("input", sift);
  filter.closest(".filter").hidden = false;
  sift();

  document.addEventListener("keydown", function (event) {
    if (event.key !== "Escape") return;
    var open = event.target.closest && event.target.closest(".heat details[open]");
    if (open) {
      open.open = false;
      open.querySelector("summary").focus();
    }
  });
  window.addEventListener("beforeprint", function () {
    all("#definitions details").forEach(function (part) { part.open = true; });
    all(".slice").forEach(function (part) { part.hidden = false; });
  });
  window.addEventListener("afterprint", function () { if (select) choose(); });
})();
