// Read a round off the main figure: with the pointer on it, or with the slider below (mouse, finger, arrow keys).
(function () {
  "use strict";
  var data = JSON.parse(document.getElementById("points").textContent);
  var reader = document.getElementById("reader");
  var slider = document.getElementById("slider");
  var readout = document.getElementById("readout");
  var plots = Array.prototype.slice.call(document.querySelectorAll("[data-frame]"));
  if (!data.round.length || !reader || !plots.length) return;

  function percent(value) {
    return value === null || value === undefined ? "—" : (100 * value).toFixed(1) + "\u202f%";
  }
  function entry(name, value, kind) {
    var span = document.createElement("span");
    var strong = document.createElement("b");
    span.className = kind;
    strong.textContent = value;
    span.append(name + " ", strong);
    return span;
  }
  function show(i) {
    var t = data.round[i];
    var parts = [entry("round", String(t), "")];
    if (data.t0 !== null) parts.push(entry("age", String(t - data.t0).replace("-", "−"), ""));
    parts.push(entry("ASR", percent(data.asr[i]), "attack"));
    parts.push(entry("main accuracy", percent(data.main_accuracy[i]), "honest"));
    if (data.twin) parts.push(entry("clean twin’s ASR", percent(data.twin[i]), "twin"));
    readout.replaceChildren.apply(readout, parts);
    slider.value = i;
    slider.setAttribute("aria-valuetext", readout.textContent);
    plots.forEach(function (plot) {
      var frame = plot.frame;
      plot.mark.style.left = frame.left + frame.width * (t - frame.from) / (frame.to - frame.from) + "%";
    });
  }
  function nearest(t) {
    var low = 0, high = data.round.length - 1;
    while (low < high) {
      var middle = (low + high) >> 1;
      if (data.round[middle] < t) low = middle + 1; else high = middle;
    }
    return low > 0 && t - data.round[low - 1] < data.round[low] - t ? low - 1 : low;
  }

  plots.forEach(function (plot) {
    plot.frame = JSON.parse(plot.dataset.frame);
    plot.mark = document.createElement("div");
    plot.mark.className = "mark";
    plot.mark.style.top = plot.frame.top + "%";
    plot.mark.style.height = plot.frame.height + "%";
    plot.append(plot.mark);
    plot.addEventListener("pointermove", function (event) {
      var box = plot.getBoundingClientRect();
      var at = (100 * (event.clientX - box.left) / box.width - plot.frame.left) / plot.frame.width;
      show(nearest(plot.frame.from + Math.min(1, Math.max(0, at)) * (plot.frame.to - plot.frame.from)));
    });
  });
  slider.max = data.round.length - 1;
  slider.addEventListener("input", function () { show(Number(slider.value)); });
  reader.hidden = false;
  show(data.t0 === null ? data.round.length - 1 : nearest(data.t0));
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (part) { part.open = true; });
  });
})();
