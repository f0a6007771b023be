"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, options = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(options)) {
      if (key in element) element[key] = value;
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  };
  const top = (values, least = 0) => values.reduce((best, value) => (value > best ? value : best), least);
  const bottom = (values) => -top(values.map((value) => -value), -Infinity);
  const isNumber = (value) => typeof value === "number";
  const short = (value, digits) => value.toExponential(digits)
    .replace(/e([+-])(\d)$/, (_, sign, digit) => `e${sign}0${digit}`);
  const share = (value) => (value !== 0 && Math.abs(value) < 1e-4
    ? `${short(100 * value, 1)} %` : `${(100 * value).toFixed(2)} %`);
  const figure = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e6
    ? String(Number(value.toPrecision(4))) : short(value, 2));
  const round = (value) => String(Number(value.toFixed(3)));
  const size = (bytes) => {
    let value = bytes;
    for (const unit of ["B", "KiB", "MiB", "GiB"]) {
      if (value < 1024) return unit === "B" ? `${Math.round(value)} B` : `${value.toFixed(1)} ${unit}`;
      value /= 1024;
    }
    return `${value.toFixed(1)} TiB`;
  };
  const written = (value, unit) => (!isNumber(value) ? "" : unit === "share" ? share(value)
    : unit === "bytes" ? size(value) : figure(value));
  const bdi = (text) => make("bdi", {}, text);
  const number = (value) => value.toLocaleString("en-US");

  const body = $("rows")?.tBodies[0];
  if (!body) {
    document.body.dataset.ready = "true";
    return;
  }
  const lines = [...body.rows];
  const several = page.groups.length > 1;
  const firstCell = several ? 2 : 1;
  const explorable = Boolean(page.curveKind?.explorable);
  const columns = page.columns.map((column, index) => ({ ...column, cell: firstCell + index }));
  const chosenCell = firstCell + columns.length;
  const state = { group: 0, metric: $("metric")?.value, row: -1, ranks: new Map() };
  const inGroup = (row) => !several || page.group[row] === state.group;
  const textAt = (row, cell) => lines[row].cells[cell].textContent;
  const valueOf = (row, key) => (key === "chosen" ? state.ranks.get(row) : page.cells[key]?.[row]);
  const metricColumn = () => (state.metric === "chosen"
    ? { key: "chosen", label: "rank chosen", unit: "count", about: "by the explorer below", cell: chosenCell }
    : columns.find((column) => column.key === state.metric));
  const say = (text) => { $("said").textContent = text; };

  /* Charts: made once, then given new data. */
  const charts = {};
  const waiting = {};
  const draw = (name, data) => {
    waiting[name] = data;
    const chart = charts[name];
    if (!chart) return;
    for (const [set, values] of Object.entries(data)) chart.data(set, values);
    chart.resize().run();
  };
  const openChart = (name) => {
    const drawn = waiting[name] ?? {};
    return window.vegaEmbed($(name), { ...page.charts[name], datasets: drawn }, {
      actions: false, ast: true, renderer: "svg", tooltip: false, hover: false, defaultStyle: false,
      logLevel: 1,
    }).then((result) => {
      charts[name] = result.view;
      if (waiting[name] !== drawn) draw(name, waiting[name]);
    });
  };
  const series = (index) => index % page.series;
  const keys = (place, entries) => place.replaceChildren(...entries.map(
    ([index, text]) => make("span", { className: `key s${series(index)}` }, bdi(text))));
  const plainTable = (head, rows) => make("table", { className: "plain" },
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, bdi(text))))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((text, index) =>
      (index ? make("td", {}, text) : make("th", { scope: "row" }, text)))))));
  const tableWhenOpen = (details, build) => {
    const place = details.querySelector(".scroll");
    const fill = () => { if (details.open) place.replaceChildren(build()); };
    details.addEventListener("toggle", fill);
    return fill;
  };

  /* The map: a grid of buttons, one of which can be reached by Tab, the others by arrows. */
  const cells = new Map();
  let grid = [];
  const at = (family, layer) => `${family}/${layer}`;
  const buildMap = () => {
    const place = $("map");
    if (!place) return;
    const held = new Map();
    const outside = [];
    lines.forEach((_, row) => {
      if (!inGroup(row)) return;
      if (page.layer[row] === null || !page.hasMap) outside.push(row);
      else {
        const key = at(page.family[row], page.layer[row]);
        if (held.has(key)) held.get(key).push(row);
        else held.set(key, [row]);
      }
    });
    const still = new Set(page.still.map(([family, layer]) => at(family, layer)));
    cells.clear();
    const families = page.hasMap ? page.families : [];
    grid = families.map((_, family) => page.layers.map((_, layer) => {
      const rows = held.get(at(family, layer));
      if (!rows) return null;
      const button = make("button", { type: "button", className: "cell", tabIndex: -1 });
      cells.set(button, rows);
      return button;
    }));
    const head = make("tr", {}, make("td"), ...page.layers.map((layer, index) => make("th", {
      scope: "col", title: `layer ${layer}`,
    }, page.layers.length <= 40 || index % 5 === 0 ? layer : make("span", { className: "hidden" }, layer))));
    const body = families.map((family, index) => make("tr", {},
      make("th", { scope: "row", title: family }, bdi(family)),
      ...page.layers.map((_, column) => {
        const button = grid[index][column];
        if (button) return make("td", {}, button);
        const quiet = still.has(at(index, column)) ? page.stillWord : "";
        return make("td", {}, make("span", { className: quiet ? "cell q0" : "cell none" },
          make("span", { className: "hidden" }, quiet || "none")));
      })));
    const table = make("table", { role: "grid", "aria-label": "Map by layer and name" },
      make("thead", {}, head), make("tbody", {}, ...body));
    table.classList.toggle("dense", page.layers.length > 40);
    place.closest(".look").classList.toggle("wide", page.layers.length > 40);
    place.replaceChildren(...(families.length ? [table] : []));
    const chips = outside.slice(0, 60).map((row) => {
      const chip = make("button", { type: "button", className: "chip" }, bdi(page.names[row]));
      cells.set(chip, [row]);
      return chip;
    });
    const more = outside.length - chips.length;
    $("outside").replaceChildren(...(chips.length ? [families.length ? "in no layer:" : "", ...chips] : []),
      ...(more > 0 ? [`and ${number(more)} more in the table`] : []));
    colour();
  };
  const largest = (rows, key) => rows.reduce((best, row) => {
    const value = valueOf(row, key);
    return isNumber(value) && !(Math.abs(value) <= Math.abs(best.value)) ? { row, value } : best;
  }, { row: rows[0], value: undefined });
  const colour = () => {
    const column = metricColumn();
    if (!column) return;
    const shown = [...cells].map(([element, rows]) => [element, rows, largest(rows, column.key)]);
    const values = shown.map(([, , found]) => found.value).filter(isNumber);
    const signed = column.unit === "signed" && values.some((value) => value < 0);
    const high = top(values.map((value) => (signed ? Math.abs(value) : value)));
    const positive = values.filter((value) => value > 0).sort((a, b) => a - b);
    const low = positive[0] ?? 0;
    const steep = !signed && high > 40 * positive[Math.floor(positive.length / 2)] && low < high;
    const step = (value) => {
      if (signed) return high ? Math.round(4 + (4 * value) / high) : 4;
      if (!high || value <= 0) return 0;
      const part = steep ? Math.log(value / low) / Math.log(high / low) : value / high;
      return 1 + Math.min(7, Math.floor(8 * part)); /* the palest is for zero and what is unchanged */
    };
    const texts = new Map();
    for (const [element, rows, found] of shown) {
      const base = element.classList.contains("chip") ? "chip" : "cell";
      element.className = isNumber(found.value) ? `${base} ${signed ? "d" : "q"}${step(found.value)}` : `${base} none`;
      const text = isNumber(found.value) ? textAt(found.row, column.cell) || figure(found.value) : "not known";
      const crowd = rows.length > 1 ? `, largest of ${rows.length}` : "";
      element.setAttribute("aria-label", `${page.names[found.row]}: ${column.label} ${text}${crowd}`);
      element.title = `${page.names[found.row]}\n${column.label} ${text}${crowd}`;
      if (base === "cell") texts.set(element, isNumber(found.value) ? text : "");
    }
    fill(texts);
    $("metric-about").textContent = column.about
      ? `${column.label}: ${column.about}` : "";
    const ramp = make("span", { className: "ramp", "aria-hidden": "true" },
      ...Array.from({ length: 9 }, (_, index) => make("i", { className: `${signed ? "d" : "q"}${index}` })));
    $("legend").replaceChildren(...(values.length ? [make("span", {},
      signed ? written(-high, column.unit) : steep ? written(low, column.unit) : "0", ramp,
      written(high, column.unit), steep ? ", by the logarithm" : "")] : []),
      ...(page.still.length ? [make("span", {}, `palest: ${page.stillWord}`)] : []));
    mark();
  };
  /* Figures in the cells, where there are few layers and all of them fit. */
  let inCells = new Map();
  const fill = (texts) => {
    inCells = texts;
    const place = $("map");
    const write = (shown) => {
      place.querySelector("table")?.classList.toggle("roomy", shown);
      for (const [element, text] of texts) element.textContent = shown ? text : "";
    };
    write(page.layers.length <= 12);
    if (place.scrollWidth > place.clientWidth) write(false);
  };
  const mark = () => {
    let reachable;
    for (const [element, rows] of cells) {
      const own = rows.includes(state.row);
      element.setAttribute("aria-pressed", String(own));
      if (element.classList.contains("cell")) {
        element.tabIndex = -1;
        if (own || !reachable) reachable = element;
      }
    }
    if (reachable) reachable.tabIndex = 0;
    for (const line of lines) line.removeAttribute("aria-current");
    if (state.row >= 0) lines[state.row].setAttribute("aria-current", "true");
  };
  const move = (button, event) => {
    const y = grid.findIndex((row) => row.includes(button));
    const x = grid[y].indexOf(button);
    const [dy, dx] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    if (!dy && !dx) return;
    event.preventDefault();
    for (let row = y + dy, column = x + dx; grid[row]?.[column] !== undefined; row += dy, column += dx) {
      const next = grid[row][column];
      if (next) {
        button.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        return;
      }
    }
  };

  /* One module. */
  const sameName = (row) => (several && page.curveKind?.across !== false
    ? lines.map((_, other) => other).filter((other) => page.names[other] === page.names[row]) : [row]);
  const select = (row, aloud = true) => {
    state.row = row;
    const rows = sameName(row);
    $("module-title").replaceChildren(bdi(page.names[row]));
    const place = [page.layer[row] === null ? "in no layer" : `layer ${page.layers[page.layer[row]]}`];
    if (several) place.push(`${page.groupWord} ${page.letters[page.group[row]]}`);
    const crowd = [...cells.values()].find((held) => held.includes(row))?.length ?? 1;
    if (page.curveKind && !page.curves[row]?.length) place.push("no curve: not a matrix that was decomposed");
    if (crowd > 1) place.push(`one of ${crowd} that share a place of the map`);
    $("module-place").textContent = place.join(", ");
    const head = rows.length > 1 ? rows.map((other) => page.letters[page.group[other]]) : [];
    $("module-facts").replaceChildren(head.length ? make("table", {},
      make("thead", {}, make("tr", {}, make("td"), ...head.map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...columns.map((column) => make("tr", {},
        make("th", { scope: "row", title: column.about }, column.label),
        ...rows.map((other) => make("td", {}, bdi(textAt(other, column.cell))))))))
      : make("dl", {}, ...columns.filter((column) => textAt(row, column.cell)).map((column) =>
        make("div", { title: column.about }, make("dt", {}, column.label),
          make("dd", {}, bdi(textAt(row, column.cell)))))));
    mark();
    showCurves();
    const column = metricColumn() ?? columns[0];
    if (aloud) say(`${page.names[row]} chosen, ${column.label} ${textAt(row, column.cell) || "not known"}`);
  };
  const energyOf = (curve, rank) => {
    let sum = 0;
    for (let index = 0; index < Math.min(rank, curve.values.length); index += 1) sum += curve.values[index] ** 2;
    return curve.energy ? Math.min(1, sum / curve.energy) : 1;
  };
  const curvesOf = (row) => {
    const rows = sameName(row);
    return rows.flatMap((other) => (page.curves[other] ?? []).map((curve, index) => ({
      curve, row: other, s: rows.length > 1 ? page.group[other] : index,
      label: rows.length > 1 ? `${page.letters[page.group[other]]}: ${page.groups[page.group[other]]}` : curve.label,
    })));
  };
  const showCurves = () => {
    if (!page.curveKind || state.row < 0) return;
    const all = curvesOf(state.row);
    $("curve-figure").hidden = !all.length;
    if (!all.length) return;
    const { log, explorable: ranked } = page.curveKind;
    const points = all.flatMap(({ curve, s }) => curve.values
      .map((v, index) => ({ i: index + 1, v, s: series(s) })).filter(({ v }) => !log || v > 0));
    const longest = top(all.map(({ curve }) => curve.values.length));
    const own = all.find(({ row }) => row === state.row) ?? all[0];
    const chosen = state.ranks.get(own.row);
    const cuts = [];
    const cut = (rank, label, ours) => cuts.push({
      x: rank + 0.5, label, own: ours, row: ours ? 6 : 22, left: rank > longest / 2 });
    if (ranked && isNumber(own.curve.rank)) cut(own.curve.rank, `${own.curve.rankLabel} ${own.curve.rank}`, 0);
    if (ranked && isNumber(chosen)) cut(chosen, `rank ${chosen}`, 1);
    const floor = own.curve.floor && all.length === 1 ? [{ y: own.curve.floor, label: own.curve.floorLabel }] : [];
    keys($("curve-legend"), all.length > 1 ? all.map(({ s, label }) => [s, label]) : []);
    draw("curve", { points, dots: longest <= 48 ? points : [], floor, cuts });
    $("curve-words").textContent = all.map((one) => words(one, chosen)).join(" ");
    fillCurveTable();
  };
  const words = ({ curve, row, label }, chosen) => {
    const { values } = curve;
    const held = values.length;
    const name = label ? `${label}: ` : "";
    if (!held) return `${name}no values.`;
    if (!page.curveKind.log) {
      const line = curve.floor ? ` ${curve.floorLabel}: ${figure(curve.floor)}.` : "";
      return `${name}${number(held)} ${page.curveKind.index}s, ${page.curveKind.axis} from ${round(bottom(values))} to ${round(top(values))}.${line}`;
    }
    const cutHere = curve.held > held ? ` (of ${number(curve.held)} measured, this page holds these)` : "";
    const kept = energyOf(curve, held);
    let text = `${name}${number(held)} singular values${cutHere}, from ${figure(values[0])} to ${figure(values[held - 1])}`;
    text += kept > 1 - exact ? "; nothing is beyond them." : `; ${share(1 - kept)} of the energy lies beyond them.`;
    if (isNumber(chosen) && row === state.row) text += ` Rank ${chosen} keeps ${share(energyOf(curve, chosen))} of the energy.`;
    if (curve.floor) text += ` ${curve.floorLabel}: ${figure(curve.floor)}.`;
    if (isNumber(curve.rank)) text += ` ${curve.rankLabel}: ${curve.rank}.`;
    const zeros = values.filter((value) => value === 0).length;
    return zeros ? `${text} ${zeros} are zero and not drawn.` : text;
  };
  const fillCurveTable = page.curveKind ? tableWhenOpen($("curve-data"), () => {
    const all = curvesOf(state.row);
    const most = top(all.map(({ curve }) => curve.values.length));
    const ranked = page.curveKind.log;
    const head = [page.curveKind.index, ...all.flatMap(({ label }) => (ranked
      ? [`${label} σ`.trim(), `${label} energy kept`.trim()] : [label]))];
    const sums = all.map(() => 0);
    return plainTable(head, Array.from({ length: most }, (_, index) => [String(index + 1),
      ...all.flatMap(({ curve }, which) => {
        const value = curve.values[index];
        sums[which] += value === undefined ? 0 : value ** 2;
        const kept = curve.energy ? Math.min(1, sums[which] / curve.energy) : 1;
        const cell = value === undefined ? "" : ranked ? figure(value) : round(value);
        return ranked ? [cell, value === undefined ? "" : share(kept)] : [cell];
      })]));
  }) : () => {};

  /* The explorer: ranks for all matrices, their error and size. */
  let matrices = [];
  let parts = [];
  const prepare = () => {
    matrices = lines.map((_, row) => row).filter((row) => inGroup(row) && page.curves[row]?.length)
      .map((row) => {
        const { values, energy, bytes } = page.curves[row][0];
        const sums = new Float64Array(values.length + 1);
        values.forEach((value, index) => { sums[index + 1] = sums[index] + value * value; });
        return { row, sums, energy, bytes, most: values.length };
      });
    parts = matrices.flatMap((matrix, which) => Array.from({ length: matrix.most }, (_, index) => ({
      which, index, worth: (matrix.sums[index + 1] - matrix.sums[index]) / matrix.bytes })));
    parts.sort((a, b) => b.worth - a.worth || a.which - b.which || a.index - b.index);
  };
  const exact = 1e-7; /* of the energy: what is lost where values are written with eight digits */
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const measure = (ranks) => {
    const energy = sum(matrices.map((matrix) => matrix.energy));
    const missed = sum(matrices.map((matrix, which) => Math.max(0, matrix.energy - matrix.sums[ranks[which]])));
    const bytes = sum(matrices.map((matrix, which) => ranks[which] * matrix.bytes));
    const part = missed > exact * energy ? missed / energy : 0;
    return { ranks, bytes, error: Math.sqrt(part), missed };
  };
  const uniform = (rank) => measure(matrices.map((matrix) => Math.min(rank, matrix.most)));
  const greedy = (budget) => {
    const ranks = matrices.map(() => 0);
    let left = budget;
    for (const { which, index } of parts) {
      if (index === ranks[which] && matrices[which].bytes <= left) {
        ranks[which] += 1;
        left -= matrices[which].bytes;
      }
    }
    return measure(ranks);
  };
  const deepest = () => top(matrices.map((matrix) => matrix.most));
  const within = (budget) => {
    const spent = greedy(budget);
    let low = 0;
    let high = deepest();
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (uniform(middle).bytes <= budget) low = middle;
      else high = middle - 1;
    }
    const even = uniform(low);
    return even.missed < spent.missed ? even : spent;
  };
  const mode = () => document.querySelector('input[name="mode"]:checked').value;
  const budgetAt = (position) => {
    const low = bottom(matrices.map((matrix) => matrix.bytes));
    const high = uniform(deepest()).bytes;
    return low * (high / low) ** (position / 1000);
  };
  const explore = () => {
    if (!matrices.length) return;
    const by = mode();
    $("by-rank").hidden = by !== "rank";
    $("by-budget").hidden = by === "rank";
    const budget = budgetAt(Number($("budget").value));
    $("budget-text").textContent = size(budget);
    const found = by === "rank" ? uniform(Number($("rank").value)) : within(budget);
    state.ranks.clear();
    matrices.forEach((matrix, which) => {
      state.ranks.set(matrix.row, found.ranks[which]);
      lines[matrix.row].cells[chosenCell].textContent = String(found.ranks[which]);
    });
    const low = bottom(found.ranks);
    const high = top(found.ranks);
    const ranks = low === high ? String(low) : `${low} to ${high}`;
    const outcome = { error: [share(found.error), "relative error", found.error],
      kept: [share(1 - found.error ** 2), "of the energy kept", 1 - found.error ** 2],
      bytes: [size(found.bytes), "adapter size", found.bytes],
      ranks: [ranks, "ranks", ranks] };
    $("outcome").replaceChildren(...Object.entries(outcome).map(([key, [text, label, value]]) =>
      make("span", { "data-figure": key, "data-value": String(value) }, label, make("b", {}, text))));
    $("budget").setAttribute("aria-valuetext", `${size(budget)}, error ${share(found.error)}`);
    $("rank").setAttribute("aria-valuetext", `rank ${$("rank").value}, error ${share(found.error)}, ${size(found.bytes)}`);
    draw("tradeoff", { frontier: frontier, here: found.bytes ? [{ bytes: found.bytes, error: found.error }] : [] });
    if (state.metric === "chosen") colour();
    showCurves();
  };
  let frontier = [];
  const steps = (most) => {
    const found = [];
    for (let rank = 1; rank <= most; rank = Math.max(rank + 1, Math.round(rank * 1.12))) found.push(rank);
    return found.at(-1) === most || !most ? found : [...found, most];
  };
  const startExplorer = () => {
    prepare();
    const most = deepest();
    const section = $("explorer-title").closest("section");
    section.hidden = !matrices.length;
    if (!matrices.length) return;
    const point = (s) => ({ bytes, error }) => ({ bytes, error, s });
    frontier = [...steps(most).map(uniform).map(point(0)),
      ...Array.from({ length: 41 }, (_, index) => within(budgetAt(25 * index))).map(point(1))];
    const rank = Math.min(Number($("rank").value) || 8, most);
    for (const input of [$("rank"), $("rank-number")]) {
      input.max = String(most);
      input.value = String(rank);
    }
    const resolved = uniform(most);
    const notes = [`${number(matrices.length)} matrices with singular values.`];
    if (resolved.error) notes.push(`Not resolved: ${share(resolved.error ** 2)} of their energy lies in singular values beyond those that this page holds, so no error below ${share(resolved.error)} can be shown.`);
    if (page.outsideShare) notes.push(`${share(page.outsideShare)} of the energy of the whole change lies in tensors without a spectrum, which are not counted here.`);
    const fewest = bottom(matrices.map((matrix) => matrix.most));
    if (fewest < most) notes.push(`Some matrices have ${fewest} values; a larger rank is ${fewest} there.`);
    $("limits").textContent = notes.join(" ");
    fillTradeoff();
    explore();
  };
  const fillTradeoff = explorable ? tableWhenOpen($("tradeoff-data"), () => plainTable(
    ["rank", "size", "error, one rank", "error, same size spent where it counts"],
    steps(deepest()).map((rank) => {
      const even = uniform(rank);
      return [String(rank), size(even.bytes), share(even.error), share(within(even.bytes).error)];
    }))) : () => {};

  /* Groups by layer. */
  const means = () => {
    const column = metricColumn();
    if (!column || column.key === "chosen") return [];
    const sums = new Map();
    lines.forEach((_, row) => {
      const value = valueOf(row, column.key);
      if (page.layer[row] === null || !isNumber(value)) return;
      const key = `${page.group[row]}/${page.layer[row]}`;
      const held = sums.get(key) ?? { layer: Number(page.layers[page.layer[row]]), s: page.group[row], total: 0, count: 0 };
      held.total += value;
      held.count += 1;
      sums.set(key, held);
    });
    return [...sums.values()].map(({ layer, s, total, count }) => ({ layer, group: s, s: series(s), value: total / count }));
  };
  const showLayers = () => {
    if (!page.charts.layers) return;
    const column = metricColumn();
    const found = means();
    $("layers-about").textContent = `${column?.label ?? ""}, as the map is coloured: the mean over each layer's ${page.word}s`;
    keys($("layers-legend"), page.groups.map((name, index) => [index, `${page.letters[index]}: ${name}`]));
    draw("layers", { layers: found });
    fillLayers();
  };
  const fillLayers = page.charts.layers ? tableWhenOpen($("layers-data"), () => {
    const found = means();
    const unit = metricColumn()?.unit;
    return plainTable(["layer", ...page.letters], page.layers.map((layer) => [layer,
      ...page.letters.map((_, group) => written(found.find((one) => one.layer === Number(layer) && one.group === group)?.value, unit))]));
  }) : () => {};

  /* The table: sorting, filtering, choosing. */
  const step = 200;
  let order = lines.map((_, row) => row);
  let most = step;
  const showRows = () => {
    const wanted = ($("filter").value || "").toLowerCase();
    const fits = order.filter((row) => page.names[row].toLowerCase().includes(wanted));
    const shown = fits.slice(0, most);
    body.replaceChildren(...shown.map((row) => lines[row]));
    const all = `${number(lines.length)} ${lines.length === 1 ? "row" : "rows"}`;
    const count = fits.length === lines.length ? all : `${number(fits.length)} of ${all}`;
    const left = fits.length - shown.length;
    $("count").textContent = left ? `${count}, the first ${number(shown.length)} shown` : count;
    $("more").hidden = !left;
    $("more").textContent = `Show ${number(Math.min(step, left))} more`;
  };
  const sortable = (row, index) => {
    if (index === 0) return page.names[row];
    if (index === chosenCell) return state.ranks.get(row);
    const column = columns[index - firstCell];
    return column && column.unit !== "text" ? page.cells[column.key][row] : textAt(row, index);
  };
  const sortBy = (index, heading) => {
    const down = heading.getAttribute("aria-sort") === "descending";
    const up = heading.getAttribute("aria-sort") === "ascending";
    const isText = lines.some((_, row) => typeof sortable(row, index) === "string");
    const rising = isText ? !up : down;
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const empty = (value) => value === undefined || value === null || value === "";
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    const keyed = lines.map((_, row) => ({ row, value: sortable(row, index) }));
    keyed.sort((a, b) => {
      if (empty(a.value) || empty(b.value)) return empty(a.value) - empty(b.value) || a.row - b.row;
      const by = isText ? compare(String(a.value), String(b.value)) : a.value - b.value;
      return (rising ? by : -by) || a.row - b.row;
    });
    order = keyed.map(({ row }) => row);
    showRows();
    say(`sorted by ${heading.textContent}, ${rising ? "ascending" : "descending"}`);
  };
  [...$("rows").tHead.rows[0].cells].forEach((heading, index) => {
    const button = make("button", { type: "button", className: "sort", title: heading.title }, heading.textContent);
    heading.replaceChildren(button);
    button.addEventListener("click", () => sortBy(index, heading));
  });
  lines.forEach((line, row) => {
    line.cells[0].replaceChildren(make("button", { type: "button", className: "pick", title: page.names[row] }, bdi(page.names[row])));
  });
  body.addEventListener("click", (event) => {
    const line = event.target.closest("tr");
    if (!event.target.closest(".pick") || !line) return;
    const row = lines.indexOf(line);
    if (several && page.group[row] !== state.group) chooseGroup(page.group[row]);
    select(row);
  });
  let typing;
  $("filter").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(showRows, 120);
  });
  $("more").addEventListener("click", () => { most += step; showRows(); });

  /* What the controls do. */
  const chooseGroup = (group) => {
    state.group = group;
    if ($("group")) $("group").value = String(group);
    if (explorable) {
      state.ranks.clear();
      lines.forEach((line) => { line.cells[chosenCell].textContent = ""; });
      startExplorer();
    }
    buildMap();
  };
  const first = () => {
    const rows = lines.map((_, row) => row).filter(inGroup);
    return rows.length ? largest(rows, state.metric ?? columns[0].key).row : 0;
  };
  if ($("metric")) {
    if (explorable) $("metric").append(make("option", { value: "chosen" }, "rank chosen"));
    $("metric").addEventListener("change", () => {
      state.metric = $("metric").value;
      colour();
      showLayers();
    });
    for (const place of [$("map"), $("outside")]) {
      place.addEventListener("click", (event) => {
        const button = event.target.closest("button");
        if (button) select(largest(cells.get(button), state.metric).row);
      });
    }
    window.addEventListener("resize", () => fill(inCells));
    $("map").addEventListener("keydown", (event) => {
      const button = event.target.closest("button");
      if (button) move(button, event);
    });
  }
  $("group")?.addEventListener("change", () => {
    chooseGroup(Number($("group").value));
    const twin = lines.findIndex((_, row) => inGroup(row) && page.names[row] === page.names[state.row]);
    select(twin >= 0 ? twin : first());
  });
  if (explorable) {
    let pending = 0;
    const soon = () => {
      cancelAnimationFrame(pending);
      pending = requestAnimationFrame(explore);
    };
    $("rank").addEventListener("input", () => { $("rank-number").value = $("rank").value; soon(); });
    $("rank-number").addEventListener("input", () => { $("rank").value = $("rank-number").value; soon(); });
    $("budget").addEventListener("input", soon);
    for (const radio of document.querySelectorAll('input[name="mode"]')) radio.addEventListener("change", explore);
    $("budget").value = "600";
    $("rank").value = "8";
  }
  showRows();
  chooseGroup(0);
  select(first(), false);
  showLayers();
  Promise.all(Object.keys(page.charts).map(openChart)).then(() => { document.body.dataset.ready = "true"; });
})();
