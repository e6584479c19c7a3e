// Values under the pointer or the arrow keys: all charts show the same step. Without it the page shows the last values.
"use strict";
const bind = () => {
  const number = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 4 });
  const short = (v) => (v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(2).replace(/\.?0+e/, "e") : number.format(v));
  const steps = (a, b) => (a === b ? `step ${a.toLocaleString("en-US")}`
    : `steps ${a.toLocaleString("en-US")} to ${b.toLocaleString("en-US")}`);

  // Show `text`, in which *this* is bold, instead of the last values; without a text, those again.
  const show = (view, text) => {
    view.readout.replaceChildren(...(text === null ? view.rest
      : text.split("*").map((part, i) => (i % 2 ? Object.assign(document.createElement("b"), { textContent: part }) : part))));
  };
  const move = (view, share) => {
    view.cursor.setAttribute("visibility", share === null ? "hidden" : "visible");
    if (share !== null) for (const x of ["x1", "x2"]) view.cursor.setAttribute(x, `${100 * share}%`);
  };
  const viewOf = (figure) => {
    const readout = figure.querySelector(".readout");
    return { figure, readout, rest: [...readout.childNodes], cursor: figure.querySelector(".cursor"),
      plot: figure.querySelector(".plot") };
  };
  // Where on the plot the pointer is, from 0 to 1 in both directions.
  const place = (svg, event) => {
    const box = svg.getBoundingClientRect();
    const within = (v) => Math.min(1, Math.max(0, v));
    return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
  };

  const main = document.querySelector("main");
  const [first, last] = [Number(main.dataset.first), Number(main.dataset.last)];
  const charts = [...document.querySelectorAll(".chart")].map((figure) => ({
    ...viewOf(figure),
    series: JSON.parse(figure.dataset.points).map(({ name, points }) => ({ name, points: points.map((p) => (p.length === 2
      ? { first: p[0], last: p[0], mean: p[1] } : { first: p[0], last: p[1], mean: p[2], low: p[3], high: p[4] })) })),
  }));
  // Maps of experts and of ranks may have columns of their own.
  const maps = [...document.querySelectorAll(".panels")].flatMap((panels) => {
    const [columns, palette, meanings] = ["columns", "palette", "values"].map((name) => JSON.parse(panels.dataset[name]));
    return [...panels.querySelectorAll(".panel")].map((figure) => ({ ...viewOf(figure), columns, palette, meanings }));
  });

  const nearest = (points, step) => {
    let [low, high] = [0, points.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (points[middle].last < step) low = middle + 1; else high = middle;
    }
    const before = points[low - 1];
    return before && step - before.last < points[low].first - step ? before : points[low];
  };
  const value = (p) => `*${short(p.mean)}*${p.low === undefined ? "" : ` (${short(p.low)} to ${short(p.high)})`}`;

  const moveMap = (view, to) => {
    const column = to === null ? -1 : view.columns.findIndex((range) => range[1] >= to);
    move(view, column < 0 ? null : (column + 0.5) / view.columns.length);
  };

  let step = null;
  const showStep = (to) => {
    step = to;
    for (const view of charts) {
      move(view, to === null ? null : last > first ? (to - first) / (last - first) : 0.5);
      if (to === null) show(view, null);
      else {
        const points = view.series.map((series) => nearest(series.points, to));
        show(view, view.series.length === 1 ? `${steps(points[0].first, points[0].last)}: ${value(points[0])}`
          : view.readout.matches(".lines")
            ? points.map((p, i) => `${value(p)} ${view.series[i].name}, ${steps(p.first, p.last)}`).join("\n")
          : points.map((p, i) => `${view.series[i].name} ${value(p)} at ${steps(p.first, p.last)}`).join(" · "));
      }
    }
    for (const view of maps) {
      moveMap(view, to);
      show(view, null);
    }
  };
  const rest = () => showStep(null);

  for (const view of charts) {
    const svg = view.plot.querySelector("svg");
    view.plot.addEventListener("pointermove", (event) => showStep(Math.round(first + place(svg, event)[0] * (last - first))));
    view.plot.addEventListener("pointerleave", rest);
    view.plot.addEventListener("blur", rest);
    view.plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return rest();
      const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!direction) return;
      event.preventDefault();
      const points = view.series[0].points;
      const at = step === null ? (direction > 0 ? -1 : points.length) : points.indexOf(nearest(points, step));
      showStep(points[Math.min(points.length - 1, Math.max(0, at + direction))].last);
    });
  }

  // The palette index of every pixel, read back from a map's image once somebody asks for it.
  const cellsOf = (view) => (view.cells ??= readCells(view));
  const readCells = async ({ figure, columns, palette }) => {
    const rows = Number(figure.dataset.rows);
    const image = new Image();
    image.src = figure.querySelector("image").getAttribute("href");
    await image.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: columns.length, height: rows });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, columns.length, rows);
    const known = new Map();
    const nearest = (at) => {
      let best = 0;
      const distance = ([r, g, b]) => Math.abs(r - data[at]) + Math.abs(g - data[at + 1]) + Math.abs(b - data[at + 2]);
      palette.forEach((colour, i) => { if (distance(colour) < distance(palette[best])) best = i; });
      return best;
    };
    return Uint8Array.from({ length: columns.length * rows }, (_, cell) => {
      const at = 4 * cell;
      const key = (data[at] << 16) | (data[at + 1] << 8) | data[at + 2];
      if (!known.has(key)) known.set(key, nearest(at));
      return known.get(key);
    });
  };
  for (const view of maps) {
    const [rows, word] = [Number(view.figure.dataset.rows), view.figure.dataset.row];
    const svg = view.plot.querySelector(".cells");
    const { columns, meanings } = view;
    let [column, row] = [0, 0];
    const showCell = async () => {
      const [c, r] = [column, row];
      const found = await cellsOf(view);
      if (c !== column || r !== row) return;
      for (const map of maps) moveMap(map, columns[c][1]);
      show(view, `${word} ${r}, ${steps(...columns[c])}: *${meanings[found[r * columns.length + c]]}*`);
    };
    const leave = () => { column = -1; rest(); };
    view.plot.addEventListener("pointermove", (event) => {
      const [x, y] = place(svg, event);
      [column, row] = [Math.min(columns.length - 1, Math.floor(x * columns.length)), Math.min(rows - 1, Math.floor(y * rows))];
      showCell();
    });
    view.plot.addEventListener("pointerleave", leave);
    view.plot.addEventListener("blur", leave);
    view.plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return leave();
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
      if (!dx && !dy) return;
      event.preventDefault();
      column = Math.min(columns.length - 1, Math.max(0, column + dx));
      row = Math.min(rows - 1, Math.max(0, row + dy));
      showCell();
    });
  }

  // All layers at the time that a slider says: each row is a column of that layer's map.
  for (const figure of document.querySelectorAll(".whole")) {
    const [slider, output, plot] = ["input", "output", ".plot"].map((part) => figure.querySelector(part));
    const panels = figure.nextElementSibling;
    const layers = maps.filter((view) => panels.contains(view.figure) && !view.figure.matches(".overview"));
    const [{ columns, palette, meanings }, rows] = [layers[0], Number(layers[0].figure.dataset.rows)];
    const readout = figure.querySelector(".readout");
    const view = { readout, rest: [...readout.childNodes] };
    let [image, found, layer, row] = [plot.querySelector(".cells"), null, 0, 0];
    const time = () => steps(...columns[slider.value]);
    const draw = async () => {
      for (const text of [time()]) { output.textContent = text; slider.setAttribute("aria-valuetext", text); }
      for (const map of maps) moveMap(map, columns[slider.value][1]);
      found ??= await Promise.all(layers.map(cellsOf));
      const canvas = Object.assign(document.createElement("canvas"), { width: rows, height: layers.length });
      canvas.className = image.className;
      canvas.style.cssText = image.style.cssText;
      const context = canvas.getContext("2d");
      const pixels = context.createImageData(rows, layers.length);
      let highest = [0, 0, -1];
      found.forEach((cells, y) => {
        for (let x = 0; x < rows; x++) {
          const value = cells[x * columns.length + Number(slider.value)];
          pixels.data.set([...palette[value], 255], 4 * (y * rows + x));
          if (value > highest[2]) highest = [y, x, value];
        }
      });
      show(view, `${time()}: highest: layer ${highest[0]}, ${figure.dataset.thing} ${highest[1]}, *${meanings[highest[2]]}*`);
      view.rest = [...readout.childNodes];
      context.putImageData(pixels, 0, 0);
      image.replaceWith(canvas);
      image = canvas;
      figure.dataset.shown = slider.value;
    };
    const showCell = async () => {
      const [l, r] = [layer, row];
      found ??= await Promise.all(layers.map(cellsOf));
      if (l !== layer || r !== row) return;
      const meaning = meanings[found[l][r * columns.length + Number(slider.value)]];
      show(view, `layer ${l}, ${figure.dataset.thing} ${r}, ${time()}: *${meaning}*`);
    };
    const leave = () => { row = -1; show(view, null); };
    slider.disabled = false;
    slider.addEventListener("input", draw);
    slider.addEventListener("blur", rest);
    plot.addEventListener("pointermove", (event) => {
      const [x, y] = place(image, event);
      [layer, row] = [Math.min(layers.length - 1, Math.floor(y * layers.length)), Math.min(rows - 1, Math.floor(x * rows))];
      showCell();
    });
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("blur", leave);
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return leave();
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
      if (!dx && !dy) return;
      event.preventDefault();
      row = Math.min(rows - 1, Math.max(0, row + dx));
      layer = Math.min(layers.length - 1, Math.max(0, layer + dy));
      showCell();
    });
  }
};
bind();
