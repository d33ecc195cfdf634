// The page: what is shown and what buttons, keys and the pointer do. Texts reach the document as text nodes only.

const $ = (id) => document.getElementById(id);
const CELLS = [4, 8, 16, 32, 48, 64, 88, 120, 160];
const THEMES = ["light", "dark"];
/** Pixels; Firefox lays out nothing wider than 17.8 million. */
const WIDEST = 17e6;

/** An element; texts among its children become text nodes. */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name === "style") for (const [key, to] of Object.entries(value)) element.style.setProperty(key, to);
    else if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

class Page {
  constructor() {
    this.state = {
      statistic: "", a: 0, b: 1, mode: "one", scale: "viridis", cell: 64, stride: 1, values: false, marks: true,
      theme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light",
    };
    this.pins = [];
    this.cursor = this.hover = null; // {run or Difference, layer, position}
    this.matches = [];
    this.match = -1;
    this.found = new Set();
    this.turns = {};
    this.differences = new Map();
    this.panes = [];
  }

  async open() {
    const header = JSON.parse($("header").textContent);
    if (header.format !== FORMAT) {
      throw new Error(`This page has data of format ${header.format}, and its script reads format ${FORMAT}: make the `
        + "page anew with one version of tuned-lens-fast.");
    }
    if (!window.DecompressionStream) {
      throw new Error("This browser is too old for the page: Firefox 113, Chrome 80, Safari 16.4 or newer show it.");
    }
    this.source = header.served ? new Fetched() : new Embedded();
    this.title = header.title;
    this.runs = header.runs.map((info, i) => new Run(this.source, i, info, header.block));
    const [tokens] = await Promise.all([
      this.source.part("tokens").then(unpacked), ...this.runs.map((run) => run.open()),
    ]);
    [this.ids, this.texts] = JSON.parse(new TextDecoder().decode(tokens));
    for (const run of this.runs) {
      run.statistics.filter((s) => s.watch !== undefined).forEach((s) => {
        s.label = s.token < 0 ? s.called : `“${this.texts[s.token]}”`;
        s.title = `log-probability of ${s.label}, nats`;
      });
    }
    if (this.runs.length > 1) this.state.mode = "two";
    const names = this.runs[0].statistics.map((s) => s.name);
    this.state.statistic = ["max_prob", "entropy", "kl", ...names].find((name) => names.includes(name));
    this.build();
    this.restore();
    this.arrange();
    await this.loadInSight();
    this.draw();
    performance.mark("first picture");
    document.documentElement.dataset.ready = "first";
    addEventListener("hashchange", () => { if (location.hash !== this.hash) { this.restore(); this.arrange(); } });
    for (const run of this.source.most === Infinity ? this.runs : []) {
      for (let at = 0; at < run.positions; at += run.block) {
        await run.load(at);
        await new Promise((resolve) => setTimeout(resolve)); // a frame between two blocks
      }
    }
    this.changed({ map: true, panel: true });
    document.documentElement.dataset.ready = "all";
  }

  // What is shown

  get statistic() {
    const { statistics } = this.shownRuns()[0];
    return statistics.find((s) => s.name === this.state.statistic) ?? statistics[0];
  }

  /** The runs of the panes: one, two, or a difference. */
  shownRuns() {
    const { a, b, mode } = this.state;
    if (mode === "one" || this.runs.length < 2) return [this.runs[a]];
    if (mode === "two") return [this.runs[a], this.runs[b]];
    const key = `${a} ${b}`;
    if (!this.differences.has(key)) this.differences.set(key, new Difference(this.runs[a], this.runs[b]));
    return [this.differences.get(key)];
  }

  /** Every n-th layer, and the output. */
  rows(run) {
    const last = run.layers.length - 1;
    return run.layers.map((_, i) => i).filter((i) => i % this.state.stride === 0 || i === last);
  }

  palette() {
    if (this.colours) return this.colours;
    const style = getComputedStyle(document.documentElement), of = (name) => style.getPropertyValue(`--${name}`).trim();
    this.colours = {
      ground: of("ground"), ink: of("ink"), pale: of("pale"), blank: of("blank"), hatch: of("hatch"), edge: of("edge"),
      mark: of("mark"), found: of("found"), foundInk: of("found-ink"),
    };
    return this.colours;
  }

  /** Panes, buttons and boxes as the state says. */
  arrange() {
    const { state } = this, shown = this.shownRuns();
    document.documentElement.dataset.theme = state.theme;
    this.colours = undefined;
    const { label } = this.statistic;
    $("statistics").replaceChildren(...shown[0].statistics.map((s, i) => h("button", {
      "aria-pressed": String(s.name === this.statistic.name), title: i < 9 ? `${s.title} (${i + 1})` : s.title,
      onclick: () => this.set({ statistic: s.name }),
    }, s.label)));
    $("mode").value = state.mode;
    $("a").value = state.a;
    $("b").value = state.b;
    $("b").hidden = state.mode === "one";
    $("stride").value = state.stride;
    for (const option of $("more").options) {
      const on = { tokens: !state.values, values: state.values, [state.scale]: true, marks: state.marks }[option.value];
      option.text = option.text.replace(/^✓ /, "");
      if (on) option.text = `✓ ${option.text}`;
    }
    $("peak").disabled = !shown[0].pair && !shown[0].peaks.length;
    const shape = (run) => `${run.layers.length} rows × ${run.positions.toLocaleString("en")} positions`;
    $("size").textContent = shape(shown[0]);
    if (this.panes.length !== shown.length) this.makePanes(shown.length);
    this.panes.forEach((pane, i) => {
      pane.run = shown[i];
      pane.name.textContent = shown[i].name;
      pane.name.hidden = this.runs.length < 2;
      pane.scroll.setAttribute("aria-label", `${shown[i].name}, ${label}: layers down, the text across. Arrow keys move, Enter pins.`);
    });
    this.keys();
    this.resize();
    this.changed({ map: true, panel: true, fragment: true });
  }

  makePanes(count) {
    this.panes = Array.from({ length: count }, () => {
      const canvas = h("canvas"), spacer = h("div"), scroll = h("div", { class: "scroll", tabIndex: 0 }, spacer);
      const name = h("h2"), view = h("div", { class: "view" }, canvas, scroll);
      const pane = { canvas, spacer, scroll, name, view, element: h("section", { class: "pane" }, name, view) };
      scroll.addEventListener("scroll", () => this.scrolled(pane), { passive: true });
      scroll.addEventListener("pointermove", (event) => this.pointed(pane, event));
      scroll.addEventListener("pointerleave", () => this.pointed(pane, null));
      scroll.addEventListener("click", (event) => this.clicked(pane, event));
      return pane;
    });
    $("panes").replaceChildren(...this.panes.map((pane) => pane.element));
    const watcher = new ResizeObserver(() => { this.resize(); this.changed({ map: true }); });
    this.watcher?.disconnect();
    this.watcher = watcher;
    this.panes.forEach((pane) => watcher.observe(pane.view));
  }

  resize() {
    const ratio = devicePixelRatio || 1;
    for (const pane of this.panes) {
      const { run, view, scroll, spacer, canvas } = pane, rows = this.rows(run).length;
      const room = view.clientHeight - HEAD - GAP - 16;
      pane.rowHeight = Math.max(15, Math.min(28, Math.floor(room / rows)));
      spacer.style.width = `${LABELS + run.positions * this.state.cell + 2}px`;
      spacer.style.height = `${HEAD + rows * pane.rowHeight + GAP + 3}px`;
      pane.width = scroll.clientWidth;
      pane.height = scroll.clientHeight;
      canvas.width = Math.round(pane.width * ratio);
      canvas.height = Math.round(pane.height * ratio);
      canvas.style.width = `${pane.width}px`;
      canvas.style.height = `${pane.height}px`;
      if (this.wanted) this.place(pane, this.wanted.x, this.wanted.y);
    }
  }

  place(pane, x, y) {
    pane.scroll.scrollLeft = Math.round(x * this.state.cell);
    if (y !== undefined) pane.scroll.scrollTop = y;
  }

  view(pane) {
    const { run } = pane, { state } = this, difference = run.pair !== undefined;
    const statistic = run.statistics.find((s) => s.name === this.statistic.name) ?? run.statistics[0];
    // The same colours for the same values in every pane.
    const high = Math.max(...this.shownRuns().map((r) => r.statistics.find((s) => s.name === statistic.name)?.high ?? -Infinity));
    const by = colouring(run, { ...statistic, high }, state.scale, state.theme);
    const layerOf = (at) => {
      if (!at) return null;
      const layer = at.run === run ? at.layer : run.layers.indexOf(at.run.layers[at.layer]);
      return layer < 0 ? null : { layer, position: at.position };
    };
    return {
      run, statistic, colouring: by, rows: this.rows(run), cell: state.cell, rowHeight: pane.rowHeight,
      left: pane.scroll.scrollLeft, top: pane.scroll.scrollTop, width: pane.width, height: pane.height,
      values: state.values, marks: state.marks, found: this.found, palette: this.palette(), texts: this.texts,
      hover: layerOf(this.hover), cursor: layerOf(this.cursor),
      pins: this.pins.map((pin) => {
        if (!difference) return pin.run === run.index ? pin : null;
        const layer = run.pair[0].index === pin.run ? run.rows.findIndex(([a]) => a === pin.layer) : -1;
        return layer < 0 ? null : { ...pin, layer };
      }).filter(Boolean),
    };
  }

  loadInSight() {
    return Promise.all(this.panes.flatMap((pane) => {
      const [from, to] = inSight(this.view(pane)), loads = [];
      const { block } = this.runs[0];
      for (let i = Math.floor(from / block); i * block < to; i++) {
        if (!pane.run.loaded(i * block)) loads.push(pane.run.load(i * block));
      }
      return loads;
    }));
  }

  /** Draw before the next frame; `map` and `panel` too if they change, `fragment` where the address is to say it. */
  changed({ map = false, panel = false, fragment = false } = {}) {
    this.stale = { map: this.stale?.map || map, panel: this.stale?.panel || panel };
    this.frame ??= requestAnimationFrame(() => { this.frame = undefined; this.draw(); });
    if (fragment) {
      clearTimeout(this.writing);
      this.writing = setTimeout(() => this.remember(), 200);
    }
  }

  draw() {
    const stale = this.stale ?? {}, ratio = devicePixelRatio || 1;
    this.stale = undefined;
    let missing = false;
    for (const pane of this.panes) {
      const view = this.view(pane), [from, to] = inSight(view);
      drawPane(new CanvasPen(pane.canvas.getContext("2d", { alpha: false }), ratio), view);
      for (let at = from; at < to; at += 64) missing ||= !pane.run.loaded(at);
    }
    if (missing) this.loadInSight().then(() => this.changed({ map: true, panel: true }), (error) => { $("size").textContent = error.message; });
    this.drawMap(stale.map);
    if (stale.map) this.drawLegend();
    if (stale.panel) this.drawPanel();
  }

  drawLegend() {
    const canvas = $("legend"), ratio = devicePixelRatio || 1;
    canvas.width = 420 * ratio;
    canvas.height = 38 * ratio;
    legend(new CanvasPen(canvas.getContext("2d"), ratio), this.view(this.panes[0]), 420, true);
    canvas.setAttribute("aria-label", this.statistic.title);
  }

  /** The whole text in a strip, when it does not fit. */
  drawMap(stale) {
    const canvas = $("map"), [pane] = this.panes, width = $("left").clientWidth, height = 43;
    const { run } = pane, wide = run.positions * this.state.cell > pane.width - LABELS;
    if (canvas.hidden === wide) { canvas.hidden = !wide; this.resize(); this.changed(); }
    if (!wide) return;
    const ratio = devicePixelRatio || 1, palette = this.palette();
    if (stale || !this.map || this.map.width !== Math.min(width, run.positions)) {
      const view = this.view(pane), { rows, statistic, colouring: by } = view;
      const across = Math.min(width, run.positions), data = new ImageData(across, rows.length);
      const rgb = (text) => text.match(/\d+/g).map(Number), ramp = by.colours.map((c) => rgb(c.fill));
      for (let px = 0; px < across; px++) {
        const from = Math.floor((px * run.positions) / across), to = Math.max(from + 1, Math.floor(((px + 1) * run.positions) / across));
        for (let i = 0; i < rows.length; i++) {
          let sum = 0, count = 0;
          for (let p = from; p < to; p++) {
            const value = run.value(statistic, rows[i], p);
            if (Number.isFinite(value)) { sum += Math.max(0, Math.min(255, by.at(value))); count++; }
          }
          if (count) data.data.set([...ramp[Math.round(sum / count)], 255], 4 * (i * across + px));
        }
      }
      this.map = document.createElement("canvas");
      this.map.width = across;
      this.map.height = rows.length;
      this.map.getContext("2d").putImageData(data, 0, 0);
    }
    if (canvas.width !== Math.round(width * ratio)) { canvas.width = Math.round(width * ratio); canvas.height = height * ratio; }
    const context = canvas.getContext("2d", { alpha: false });
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.imageSmoothingEnabled = false;
    context.fillStyle = palette.blank;
    context.fillRect(0, 0, width, height);
    context.drawImage(this.map, 0, 0, width, height);
    const at = (position) => (position / run.positions) * width;
    context.fillStyle = palette.found;
    for (const [from] of this.matches) context.fillRect(at(from), 0, 2, 6);
    for (const pin of this.view(pane).pins) { context.fillStyle = pin.colour; context.fillRect(at(pin.position) - 1.5, 0, 3, height); }
    const left = pane.scroll.scrollLeft / this.state.cell, seen = (pane.width - LABELS) / this.state.cell;
    const x = at(left), w = Math.max(5, at(seen));
    context.lineWidth = 4;
    context.strokeStyle = palette.ground;
    context.strokeRect(x, 1.5, w, height - 3);
    context.lineWidth = 2;
    context.strokeStyle = palette.ink;
    context.strokeRect(x, 1.5, w, height - 3);
  }

  // Cells, as text

  token(number, className = "token") {
    return h("bdi", { class: className }, number >= 0 ? this.texts[number] : "–");
  }

  /** The run and layer that a cell of a pane stands for. */
  sides(at) {
    if (at.run.pair) return at.run.pair.map((run, i) => ({ run, layer: at.run.rows[at.layer][i] }));
    const name = at.run.layers[at.layer], sides = [{ run: at.run, layer: at.layer }];
    for (const run of this.shownRuns()) {
      if (run !== at.run && run.layers.includes(name) && at.position < run.positions) sides.push({ run, layer: run.layers.indexOf(name) });
    }
    return sides;
  }

  /** Statistics of a cell, a column a run. */
  numbers(sides, position) {
    const rows = sides[0].run.statistics.map((s) => h("tr", { class: s.name === this.statistic.name ? "now" : "" },
      h("th", {}, h("bdi", {}, s.label)),
      ...sides.map(({ run, layer }) => {
        const own = run.statistics.find((other) => other.name === s.name);
        return h("td", {}, own ? shown(run.value(own, layer, position), own) : "");
      })));
    const head = sides.length > 1 ? [h("thead", {}, h("tr", {}, h("th"), ...sides.map(({ run }) => h("th", {}, run.name))))] : [];
    return h("table", {}, ...head, h("tbody", {}, ...rows));
  }

  bars({ run, layer }, position, paint) {
    const bars = h("div", { class: "bars" });
    for (let i = 0; i < run.k; i++) {
      const token = run.top(layer, position, i), p = Math.exp(run.logProb(layer, position, i));
      if (token === undefined) break;
      const right = token === run.target[position] ? "token right" : "token";
      bars.append(this.token(token, right),
        h("div", { class: "track" }, h("div", { class: "fill", style: { width: `${100 * p || 0}%`, background: paint(i) } })),
        h("span", { class: "number" }, Number.isNaN(p) ? "NaN" : `${(100 * p).toPrecision(3).slice(0, 4).replace(/\.$/, "")}%`));
    }
    return bars;
  }

  where(run, layer, position) {
    return `${layer === run.layers.length - 1 ? "output" : `layer ${run.layers[layer]}`}, position ${position}`;
  }

  showTip(at, x, y) {
    const tip = $("tip");
    if (!at || !this.sides(at).every(({ run }) => run.loaded(at.position))) { tip.hidden = true; return; }
    const sides = this.sides(at), [{ run, layer }] = sides;
    // Of two lenses the text is one, of two texts it is not.
    const texts = sides.filter((side) => side.run === run || ["read", "target"].some((of) => side.run[of][at.position] !== run[of][at.position]));
    tip.replaceChildren(
      h("div", { class: "where" }, this.where(run, layer, at.position)),
      h("table", {}, h("tbody", {}, ...[["reads", "read"], ["next", "target"]].map(([label, of]) => h("tr", {}, h("th", {}, label),
        ...texts.map((side) => h("td", { class: "text" }, this.token(side.run[of][at.position]))))))),
      this.numbers(sides, at.position),
      ...sides.flatMap((side) => [...(sides.length > 1 ? [h("div", { class: "run" }, side.run.name)] : []), this.bars(side, at.position, () => "var(--pale)")]),
    );
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${x + 18 + width > innerWidth ? Math.max(4, x - width - 18) : x + 18}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 18, innerHeight - height - 6))}px`;
  }

  drawPanel() {
    const panel = $("panel");
    if (panel.hidden === this.pins.length > 0) { panel.hidden = !this.pins.length; this.resize(); this.changed({ map: true }); }
    if (panel.hidden) { panel.replaceChildren(); return; }
    const s = this.statistic;
    const lines = this.pins.map((pin) => {
      const run = this.runs[pin.run], own = run.statistics.find((other) => other.name === s.name);
      return {
        colour: pin.colour, at: pin.layer, layers: run.layers,
        values: run.layers.map((_, layer) => {
          const value = own ? run.value(own, layer, pin.position) : undefined;
          return s.log ? Math.log10(value) : value;
        }),
      };
    });
    panel.replaceChildren(
      h("div", { class: "card" },
        h("header", {}, h("h3", {}, `${s.title}, through the layers`), h("span", { class: "room" }),
          h("button", { onclick: () => { this.pins = []; this.changed({ map: true, panel: true, fragment: true }); } }, "unpin all")),
        chart(lines, { log: s.log, statistic: s })),
      ...this.pins.map((pin) => this.card(pin)));
  }

  card(pin) {
    const run = this.runs[pin.run], { layer, position } = pin;
    const card = h("article", { class: "card pin", style: { "--pin": pin.colour } },
      h("header", {}, h("span", { class: "where" }, this.where(run, layer, position)), h("span", { class: "room" }),
        h("button", { title: "scroll to it", onclick: () => this.goTo(run, layer, position) }, "show"),
        h("button", { title: "unpin", "aria-label": "unpin", onclick: () => this.unpin(pin) }, "✕")));
    if (this.runs.length > 1) card.append(h("div", { class: "run" }, run.name));
    if (!run.loaded(position)) { run.load(position).then(() => this.changed({ panel: true })); return card; }
    const around = h("div", { class: "around" });
    for (let at = Math.max(0, position - 24); at < Math.min(run.positions, position + 13); at++) {
      if (run.read[at] >= 0) around.append(this.token(run.read[at], `token${at === position ? " here" : at === position + 1 ? " coming" : ""}`), h("wbr"));
    }
    if (around.childElementCount) card.append(around);
    // The five likeliest tokens, then the target and watched tokens if they are none of these, and groups of such.
    const tokens = Array.from({ length: Math.min(5, run.k) }, (_, i) => run.top(layer, position, i)), colour = (i) => PINS[i % PINS.length];
    const others = [];
    const add = (token, name) => { if (token >= 0 && !tokens.includes(token) && !others.some((other) => other.token === token)) others.push({ token, name }); };
    add(run.target[position], "next: ");
    run.watched.forEach((token) => add(token, "watched: "));
    run.statistics.filter((s) => s.token < 0).forEach((group) => others.push({ group, name: "watched: " }));
    const lines = [...tokens.map((token, i) => ({ token, colour: colour(i) })),
      ...others.map((other, i) => ({ ...other, colour: i ? colour(4 + i) : "var(--ink)", dashed: true }))]
      .map((line) => ({ ...line, at: layer, layers: run.layers, values: run.layers.map((_, l) =>
        Math.exp(line.group ? run.value(line.group, l, position) : run.logProbOf(line.token, l, position))) }));
    if (run.k) card.append(this.bars({ run, layer }, position, (i) => (i < 5 ? colour(i) : "var(--pale)")));
    if (lines.length) {
      card.append(h("h3", {}, "their probabilities through the layers"), chart(lines, { low: 0, high: 1, percent: true }),
        h("div", { class: "keyed" }, ...lines.filter((line) => line.dashed).map((line) => h("span", {},
          h("i", { style: { "border-color": line.colour, "border-top-style": "dashed" } }), line.name, line.group ? h("bdi", {}, line.group.called) : this.token(line.token)))));
    }
    card.append(this.numbers([{ run, layer }], position));
    return card;
  }

  keys() {
    const { state } = this, parts = [];
    const swatch = (name) => h("span", { class: `swatch ${name}` });
    if (this.panes[0].run.k && !state.values) parts.push(h("span", {}, h("b", {}, "bold"), ": the token that came next"));
    if (state.marks && this.panes[0].run.k) parts.push(h("span", {}, swatch("first"), "the final answer first appears"));
    parts.push(h("span", {}, swatch("nan"), "NaN or ∞"), h("span", {}, "click pins a cell"));
    $("keys").replaceChildren(...parts);
  }

  // What is done

  set(change) {
    Object.assign(this.state, change);
    this.turns = {};
    this.wanted = this.standing();
    this.arrange();
    this.wanted = undefined;
  }

  /** Where the view stands: positions across, pixels down. */
  standing() {
    const { scroll } = this.panes[0];
    return { x: scroll.scrollLeft / this.state.cell, y: scroll.scrollTop };
  }

  zoom(by) {
    const at = CELLS.indexOf(this.state.cell), cell = CELLS[Math.max(0, Math.min(CELLS.length - 1, at + by))];
    if (cell === this.state.cell || cell * this.panes[0].run.positions > WIDEST) return;
    // The middle stays where it is, or the cursor.
    const { x, y } = this.standing(), half = (this.panes[0].width - LABELS) / 2;
    const middle = x + half / this.state.cell;
    this.state.cell = cell;
    this.wanted = { x: Math.max(0, middle - half / cell), y };
    this.arrange();
    this.wanted = undefined;
  }

  scrolled(pane) {
    for (const other of this.panes) {
      if (other === pane) continue;
      if (other.scroll.scrollLeft !== pane.scroll.scrollLeft) other.scroll.scrollLeft = pane.scroll.scrollLeft;
      if (other.scroll.scrollTop !== pane.scroll.scrollTop) other.scroll.scrollTop = pane.scroll.scrollTop;
    }
    $("tip").hidden = true;
    this.changed({ fragment: true });
  }

  at(pane, event) {
    const box = pane.view.getBoundingClientRect(), cell = cellAt(this.view(pane), event.clientX - box.left, event.clientY - box.top);
    return cell && { run: pane.run, ...cell };
  }

  pointed(pane, event) {
    this.hover = event && this.at(pane, event);
    this.showTip(this.hover, event?.clientX, event?.clientY);
    this.changed();
  }

  clicked(pane, event) {
    const at = this.at(pane, event);
    if (!at) return;
    this.cursor = at;
    this.pin(at);
  }

  /** Pin a cell, or unpin it. */
  pin(at) {
    const [{ run, layer }] = this.sides(at);
    const same = this.pins.find((pin) => pin.run === run.index && pin.layer === layer && pin.position === at.position);
    if (same) { this.unpin(same); return; }
    if (this.pins.length === PINS.length) this.pins.shift();
    const colour = PINS.find((one) => this.pins.every((pin) => pin.colour !== one));
    this.pins.push({ run: run.index, layer, position: at.position, colour });
    this.changed({ map: true, panel: true, fragment: true });
  }

  unpin(pin) {
    this.pins = this.pins.filter((other) => other !== pin);
    this.changed({ map: true, panel: true, fragment: true });
  }

  /** Put the cursor on a cell of a run and bring it into sight. */
  goTo(run, layer, position) {
    let pane = this.panes.find((one) => one.run === run);
    if (!pane && this.panes[0].run.pair?.includes(run)) {
      [pane] = this.panes;
      const side = pane.run.pair.indexOf(run);
      layer = pane.run.rows.findIndex((rows) => rows[side] === layer);
      if (layer < 0 || position >= pane.run.positions) return;
    }
    if (!pane) { this.set({ a: run.index, mode: "one" }); [pane] = this.panes; }
    this.cursor = { run: pane.run, layer, position };
    if (!this.rows(pane.run).includes(layer)) this.set({ stride: 1 });
    const { cell } = this.state, room = pane.width - LABELS, left = position * cell;
    const { scroll } = pane, across = scroll.scrollLeft;
    if (left < across || left + cell > across + room) scroll.scrollLeft = left - room / 2 + cell / 2;
    const view = this.view(pane), down = rowTop(view, view.rows.indexOf(layer)), tall = pane.height - HEAD;
    if (down < scroll.scrollTop) scroll.scrollTop = down;
    else if (down + pane.rowHeight > scroll.scrollTop + tall) scroll.scrollTop = down + pane.rowHeight - tall;
    this.say();
    this.changed({ fragment: true });
  }

  /** Tell the cursor's cell to those who listen. */
  say() {
    const { run, layer, position } = this.cursor;
    if (!run.loaded(position)) return;
    const value = run.value(this.statistic, layer, position), token = run.k ? this.texts[run.top(layer, position)] : "";
    $("status").textContent = `${this.where(run, layer, position)}: ${token} ${this.statistic.label} ${shown(value, this.statistic)}`;
  }

  move(rows, positions) {
    const run = this.cursor && this.panes.some((pane) => pane.run === this.cursor.run) ? this.cursor.run : this.panes[0].run;
    const shownRows = this.rows(run);
    if (this.cursor?.run !== run) {
      this.goTo(run, shownRows[0], Math.min(run.positions - 1, Math.ceil(this.standing().x)));
    } else {
      const i = Math.max(0, Math.min(shownRows.length - 1, shownRows.indexOf(this.cursor.layer) + rows));
      this.goTo(run, shownRows[i], Math.max(0, Math.min(run.positions - 1, this.cursor.position + positions)));
    }
    this.tipAtCursor();
  }

  tipAtCursor() {
    const pane = this.panes.find((one) => one.run === this.cursor?.run);
    if (!pane) return;
    const box = pane.view.getBoundingClientRect(), view = this.view(pane);
    requestAnimationFrame(() => this.showTip(this.cursor,
      box.left + LABELS + (this.cursor.position + 1) * view.cell - pane.scroll.scrollLeft - 10,
      box.top + HEAD + rowTop(view, view.rows.indexOf(this.cursor.layer)) + pane.rowHeight - pane.scroll.scrollTop - 10));
  }

  /** The next of a list of cells of a run, at each call. */
  jump(kind, run, cells) {
    if (!cells.length) return;
    const turn = this.turns[kind] ?? 0;
    this.turns[kind] = (turn + 1) % cells.length;
    this.goTo(run, ...cells[turn]);
    this.tipAtCursor();
  }

  jumpToPeak() {
    const [run] = this.shownRuns();
    if (run.pair) this.jump("peak", run.pair[0], run.pair[0].peaks); else this.jump("peak", run, run.peaks);
  }

  jumpToChange() {
    const [shownRun] = this.shownRuns(), run = shownRun.pair?.[0] ?? shownRun;
    const s = run.statistics.find((one) => one.name === this.statistic.name);
    if (s.watch !== undefined && !s.changes.length) s.changes = largestChanges(run, s);
    this.jump("change", run, s.changes);
  }

  async jumpToAnswer() {
    const [run] = this.shownRuns(), at = this.cursor && this.panes.some((pane) => pane.run === this.cursor.run)
      ? this.cursor : { run, position: Math.ceil(this.standing().x) };
    if (!at.run.k) return;
    await at.run.load(at.position);
    this.goTo(at.run, at.run.firstAnswer(at.position), at.position);
    this.tipAtCursor();
  }

  find(query) {
    const [shownRun] = this.shownRuns(), run = shownRun.pair?.[0] ?? shownRun;
    this.matches = [];
    this.match = -1;
    this.found = new Set();
    const plain = (text) => text.toLowerCase().replaceAll("␣", "·");
    const wanted = plain(query).replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
    if (wanted) {
      let text = "";
      const starts = Array.from(run.read, (token) => { const start = text.length; if (token >= 0) text += plain(this.texts[token]); return start; });
      let position = 0;
      for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
        while (position + 1 < starts.length && starts[position + 1] <= at) position++;
        let end = position;
        while (end + 1 < starts.length && starts[end + 1] < at + wanted.length) end++;
        this.matches.push([position, end]);
        for (let p = position; p <= end; p++) this.found.add(p);
      }
    }
    this.query = query;
    $("matches").textContent = query ? `${this.matches.length ? "" : "no "}${this.matches.length > 1 ? `${this.matches.length.toLocaleString("en")} matches` : this.matches.length ? "1 match" : "match"}` : "";
    this.changed({ fragment: true });
  }

  nextMatch(by) {
    const { matches } = this;
    if (!matches.length) return;
    const first = this.match < 0 ? matches.findIndex(([from]) => from >= Math.floor(this.standing().x)) : this.match + by;
    this.match = (Math.max(first, this.match < 0 ? 0 : first) + matches.length) % matches.length;
    $("matches").textContent = `${(this.match + 1).toLocaleString("en")} of ${matches.length.toLocaleString("en")}`;
    const [shownRun] = this.shownRuns(), run = shownRun.pair?.[0] ?? shownRun;
    const layer = this.cursor?.run === run ? this.cursor.layer : run.layers.length - 1;
    this.goTo(run, layer, matches[this.match][0]);
  }

  // Files

  save(kind) {
    const name = `${this.title.replace(/[^\p{L}\p{N}._-]+/gu, "_").slice(0, 80)}-${this.statistic.name}.${kind}`;
    const send = (blob) => {
      const link = h("a", { href: URL.createObjectURL(blob), download: name });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    };
    if (kind === "png") {
      const canvas = document.createElement("canvas"), { width, height } = this.pictureSize();
      canvas.width = 2 * width;
      canvas.height = 2 * height;
      const context = canvas.getContext("2d"), pen = new CanvasPen(context, 2);
      this.picture(pen, (x, y, draw) => { context.save(); context.translate(x, y); draw(); context.restore(); pen.font = pen.fill = pen.align = undefined; });
      canvas.toBlob(send);
    } else if (kind === "svg") send(new Blob([this.svg()], { type: "image/svg+xml" }));
    else send(new Blob([this.csv()], { type: "text/csv;charset=utf-8" }));
  }

  pictureSize() {
    const width = this.panes.reduce((sum, pane) => sum + pane.width, 0);
    const tall = Math.max(...this.panes.map((pane) => Math.min(pane.height, HEAD + rowsHeight(this.view(pane)) + 2)));
    return { width, tall, height: tall + 26 + 50 };
  }

  picture(pen, moved) {
    const { width, height, tall } = this.pictureSize(), palette = this.palette();
    pen.rect(0, 0, width, height, palette.ground);
    let x = 0;
    for (const pane of this.panes) {
      const heading = this.panes.length > 1 || pane.run.pair ? pane.run.name : this.title;
      moved(x, 26, () => drawPane(pen, { ...this.view(pane), height: tall, hover: null, cursor: null }));
      pen.text(fitted(heading, pane.width - LABELS - 8, 13, true), x + LABELS, 15, palette.ink, 13, true, "left");
      x += pane.width;
    }
    moved(LABELS, height - 44, () => legend(pen, this.view(this.panes[0]), Math.min(420, width - LABELS - 10), false));
  }

  svg() {
    const { width, height } = this.pictureSize(), pen = new SvgPen(width, height);
    this.picture(pen, (x, y, draw) => { pen.parts.push(`<g transform="translate(${x} ${y})">`); draw(); pen.parts.push("</g>"); });
    return String(pen);
  }

  /** A row a cell. Text is JSON, as in the files of --out, so that no spreadsheet takes it for a formula. */
  csv() {
    const quoted = (text) => `"${JSON.stringify(text).replaceAll('"', '""')}"`;
    const number = (value) => (value === undefined || value === null ? "" : Number.isFinite(value) || Number.isNaN(value)
      ? String(Number.isInteger(value) ? value : Number(value.toPrecision(4))) : quoted(String(value)));
    const token = (at) => (at >= 0 ? quoted(this.texts[at]) : "");
    const runs = this.panes.flatMap((pane) => pane.run.pair ?? [pane.run]), [{ statistics, k }] = runs;
    const tops = Array.from({ length: Math.min(...runs.map((run) => run.k)) }, (_, i) => i);
    const title = (s) => (s.watch === undefined ? s.name : quoted(`log_prob ${s.token < 0 ? s.called : this.texts[s.token]}`));
    const lines = [["run", "layer", "position", "token", "next", ...statistics.map(title), ...(k ? tops.flatMap((i) => [`top_token_${i}`, `top_log_prob_${i}`]) : [])]];
    for (const pane of this.panes) {
      const view = this.view(pane), [from, to] = inSight(view);
      for (const layer of view.rows) {
        for (let position = from; position < to; position++) {
          for (const { run, layer: row } of pane.run.pair ? this.sides({ run: pane.run, layer, position }) : [{ run: pane.run, layer }]) {
            lines.push([quoted(run.name), quoted(run.layers[row]), position, token(run.read[position]), token(run.target[position]),
              ...statistics.map((s) => { const own = run.statistics.find((one) => one.name === s.name); return own ? number(run.value(own, row, position)) : ""; }),
              ...tops.flatMap((i) => [token(run.top(row, position, i)), number(run.logProb(row, position, i))])]);
          }
        }
      }
    }
    return `${lines.map((line) => line.join(",")).join("\r\n")}\r\n`;
  }

  // The address

  remember() {
    const { state } = this, { x, y } = this.standing(), entries = {
      s: this.statistic.name, x: x.toFixed(2), y: Math.round(y), w: state.cell, c: state.scale, t: state.theme,
      l: state.stride, v: Number(state.values), m: Number(state.marks), p: this.pins.map((pin) => [pin.run, pin.layer, pin.position].join(".")).join("_"),
    };
    if (this.runs.length > 1) Object.assign(entries, { a: state.a, b: state.b, r: state.mode });
    if (this.query) entries.f = this.query;
    this.hash = `#${new URLSearchParams(entries)}`;
    try { history.replaceState(null, "", this.hash); } catch { /* a frame of a notebook has no address of its own */ }
  }

  /** What the fragment says, as far as it can be. */
  restore() {
    const said = new URLSearchParams(location.hash.slice(1)), { state } = this;
    const whole = (key, below, usual) => { const n = Number(said.get(key) ?? NaN); return Number.isInteger(n) && n >= 0 && n < below ? n : usual; };
    const among = (key, values, usual) => (values.includes(said.get(key)) ? said.get(key) : usual);
    state.a = whole("a", this.runs.length, state.a);
    state.b = whole("b", this.runs.length, Math.min(state.b, this.runs.length - 1));
    if (this.runs.length > 1) state.mode = among("r", ["one", "two", "minus"], state.mode);
    state.statistic = among("s", this.shownRuns()[0].statistics.map((s) => s.name), state.statistic);
    state.scale = among("c", Object.keys(SCALES), state.scale);
    state.theme = among("t", THEMES, state.theme);
    state.cell = Number(among("w", CELLS.map(String), String(state.cell)));
    while (state.cell > CELLS[0] && state.cell * Math.max(...this.runs.map((run) => run.positions)) > WIDEST) state.cell = CELLS[CELLS.indexOf(state.cell) - 1];
    state.stride = Number(among("l", ["1", "2", "3", "4", "8"], String(state.stride)));
    state.values = Boolean(whole("v", 2, Number(state.values)));
    state.marks = Boolean(whole("m", 2, Number(state.marks)));
    if (said.has("p")) {
      this.pins = said.get("p").split("_").map((one) => one.split(".").map(Number)).filter(([run, layer, position]) =>
        this.runs[run] && this.runs[run].layers[layer] !== undefined && Number.isInteger(position) && position >= 0 && position < this.runs[run].positions)
        .slice(0, PINS.length).map(([run, layer, position], i) => ({ run, layer, position, colour: PINS[i] }));
    }
    const number = (key) => { const n = Number(said.get(key) ?? 0); return Number.isFinite(n) ? Math.max(0, n) : 0; };
    this.wanted = { x: number("x"), y: number("y") };
    this.arrange();
    // A panel of pins takes room away first, or places are lost.
    this.drawPanel();
    this.resize();
    this.wanted = undefined;
    const query = said.get("f") ?? "";
    if (query !== (this.query ?? "")) { $("find").value = query; this.find(query); }
  }

  // Wiring, once

  build() {
    document.title = $("title").textContent = this.title;
    $("comparing").hidden = this.runs.length < 2;
    for (const id of ["a", "b"]) $(id).replaceChildren(...this.runs.map((run, i) => h("option", { value: i }, run.name)));
    const click = (id, action) => $(id).addEventListener("click", action);
    const change = (id, action) => $(id).addEventListener("change", (event) => action(event.target.value));
    click("theme", () => this.set({ theme: THEMES[1 - THEMES.indexOf(this.state.theme)] }));
    click("wider", () => this.zoom(1));
    click("narrower", () => this.zoom(-1));
    click("peak", () => this.jumpToPeak());
    click("change", () => this.jumpToChange());
    click("answer", () => this.jumpToAnswer());
    click("previous", () => this.nextMatch(-1));
    click("asking", () => this.help());
    change("stride", (value) => this.set({ stride: Number(value) }));
    change("a", (value) => this.set({ a: Number(value) }));
    change("b", (value) => this.set({ b: Number(value) }));
    change("mode", (value) => this.set({ mode: value }));
    change("more", (value) => {
      $("more").value = "";
      if (["png", "svg", "csv"].includes(value)) this.save(value);
      else if (value === "marks") this.set({ marks: !this.state.marks });
      else if (value in SCALES) this.set({ scale: value });
      else if (value) this.set({ values: value === "values" });
    });
    $("find").addEventListener("input", (event) => this.find(event.target.value));
    $("finding").addEventListener("submit", (event) => { event.preventDefault(); this.nextMatch(1); });
    $("going").addEventListener("submit", (event) => {
      event.preventDefault();
      const position = Number($("position").value.replace(/[,\s]/g, "")), [run] = this.shownRuns();
      if (Number.isInteger(position) && position >= 0 && position < run.positions && $("position").value.trim()) {
        $("position").blur();
        this.goTo(run, this.cursor?.run === run ? this.cursor.layer : run.layers.length - 1, position);
      } else {
        $("status").textContent = $("position").title = `positions are 0 to ${run.positions - 1}`;
        $("position").select();
      }
    });
    const drag = (event) => {
      if (!event.buttons && event.type !== "pointerdown") return;
      const box = $("map").getBoundingClientRect(), [pane] = this.panes;
      pane.scroll.scrollLeft = ((event.clientX - box.left) / box.width) * pane.run.positions * this.state.cell - (pane.width - LABELS) / 2;
    };
    $("map").addEventListener("pointerdown", (event) => { $("map").setPointerCapture(event.pointerId); drag(event); });
    $("map").addEventListener("pointermove", drag);
    addEventListener("keydown", (event) => this.pressed(event));
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
    if (event.key === "Escape") { this.escape(event.target); return; }
    if (typing || (event.target.tagName === "BUTTON" && ["Enter", " "].includes(event.key))) return;
    const screen = Math.max(1, Math.floor((this.panes[0].width - LABELS) / this.state.cell) - 1), { positions } = this.panes[0].run;
    const focus = (id) => () => { $(id).focus(); $(id).select(); };
    const action = {
      ArrowLeft: () => this.move(0, -1), ArrowRight: () => this.move(0, 1), ArrowUp: () => this.move(-1, 0), ArrowDown: () => this.move(1, 0),
      PageUp: () => this.move(0, -screen), PageDown: () => this.move(0, screen), Home: () => this.move(0, -positions), End: () => this.move(0, positions),
      Enter: () => { if (this.cursor) this.pin(this.cursor); }, "/": focus("find"), g: focus("position"), "?": () => this.help(),
      n: () => this.nextMatch(1), N: () => this.nextMatch(-1), k: () => this.jumpToPeak(), c: () => this.jumpToChange(), f: () => this.jumpToAnswer(),
      "+": () => this.zoom(1), "=": () => this.zoom(1), "-": () => this.zoom(-1), t: () => $("theme").click(), v: () => this.set({ values: !this.state.values }),
    }[event.key] ?? (/^[1-9]$/.test(event.key) && (() => {
      const s = this.shownRuns()[0].statistics[Number(event.key) - 1];
      if (s) this.set({ statistic: s.name });
    }));
    if (!action) return;
    event.preventDefault();
    action();
  }

  /** What lies on top goes first: a box being typed in, the tip and the cursor, what was found, the pins. */
  escape(target) {
    if (target.tagName === "INPUT" || target.tagName === "SELECT") target.blur();
    else if (!$("tip").hidden || this.cursor) { $("tip").hidden = true; this.cursor = null; }
    else if (this.query) { $("find").value = ""; this.find(""); }
    else this.pins = [];
    this.changed({ map: true, panel: true, fragment: true });
  }

  help() {
    const row = (keys, text) => h("tr", {}, h("td", {}, ...keys.split(" ").map((key) => h("kbd", {}, key))), h("td", { class: "text" }, text));
    $("help").replaceChildren(
      h("h3", {}, "What this shows"),
      h("p", {}, "Layers down, the text across. Each cell holds the token that the layer finds likeliest to come next; the colour is a number of "
        + "that layer there. The last row is the model's own output. Point at a cell for all of its numbers, click to pin it. "
        + "The address keeps the view: copy it to come back to it."),
      h("table", {}, h("tbody", {},
        row("← → ↑ ↓", "move the cursor; Page Up and Down by a screen, Home and End to the ends"), row("Enter", "pin the cell, or unpin it"),
        row("1 … 9", "choose what the colours show"), row("/", "find a token or a string"), row("n N", "next match, the one before"),
        row("g", "go to a position"), row("k", "the largest KL from the output; again for the next"), row("c", "the largest change between two layers"),
        row("f", "where the output's answer first appears, in this column"), row("+ −", "wider, narrower columns"), row("v", "tokens or values in the cells"),
        row("t", "dark or light"), row("Esc", "close, let go of the cursor, of what was found, of the pins"))),
      h("form", { method: "dialog" }, h("button", {}, "close")));
    $("help").showModal();
  }
}

function largestChanges(run, statistic) {
  const found = [];
  for (let position = 0; position < run.positions; position++) {
    for (let layer = 1; layer < run.layers.length; layer++) {
      const change = Math.abs(run.value(statistic, layer, position) - run.value(statistic, layer - 1, position));
      if (Number.isFinite(change)) found.push([change, layer, position]);
    }
  }
  return found.sort((a, b) => b[0] - a[0]).slice(0, 100).map(([, layer, position]) => [layer, position]);
}

/** The bar of colours, with its ends named. */
function legend(pen, view, width, clear) {
  const { palette, colouring: by, statistic } = view, title = view.run.pair ? `${statistic.title}: difference${by.log || statistic.log ? " of log10" : ""}` : statistic.title;
  if (clear) pen.context.clearRect(0, 0, width, 38);
  const bar = Math.min(width, 400);
  for (let i = 0; i < 100; i++) pen.rect((bar * i) / 100, 0, bar / 100 + 0.5, 9, by.colours[Math.round((255 * (by.log ? 99 - i : i)) / 99)].fill);
  const label = (value) => (by.log ? Math.round(10 ** value).toLocaleString("en") : shown(value));
  const exact = ["rank", "max_prob", "tv", "js"].includes(statistic.name);
  const open = view.run.pair !== undefined;
  pen.text(`${open || statistic.low < 0 ? "≤ " : ""}${label(by.low)}`, 0, 17, palette.pale, 11, false, "left");
  pen.text(`${open || !(exact || statistic.high === 0) ? "≥ " : ""}${label(by.high)}`, bar, 17, palette.pale, 11, false, "right");
  pen.text(label((by.low + by.high) / 2), bar / 2, 17, palette.pale, 11, false, "center");
  pen.text(title, 0, 31, palette.ink, 12, false, "left");
}

/** Lines through the layers. Each: values (NaN: none), colour, at (the layer of its dot), dashed. */
function chart(lines, { low, high, log = false, percent = false, statistic }) {
  const width = 340, height = 120, left = 34, right = 6, top = 8, bottom = 18;
  const finite = lines.flatMap((line) => line.values.filter(Number.isFinite));
  low ??= Math.min(0, ...finite);
  high ??= Math.max(...finite);
  if (!(high > low)) high = low + 1;
  const count = Math.max(...lines.map((line) => line.values.length));
  const x = (i) => left + (count > 1 ? (i / (count - 1)) * (width - left - right) : 0), y = (v) => height - bottom - ((v - low) / (high - low)) * (height - top - bottom);
  const figure = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const v of [low, (low + high) / 2, high]) {
    const text = percent ? `${Math.round(100 * v)}%` : log ? Math.round(10 ** v).toLocaleString("en") : shown(v, log ? statistic : undefined);
    figure.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: y(v), y2: y(v) }), svg("text", { x: left - 5, y: y(v) + 3, "text-anchor": "end" }, text));
  }
  const { layers } = lines.find((line) => line.values.length === count), every = Math.ceil(count / 7);
  for (let i = 0; i < count; i++) {
    if (i === count - 1 || (i % every === 0 && count - 1 - i >= every / 2)) {
      figure.append(svg("text", { x: x(i), y: height - 4, "text-anchor": i === count - 1 ? "end" : "middle" }, layers[i]));
    }
  }
  for (const line of lines) {
    let path = "", pen = "M";
    line.values.forEach((value, i) => {
      if (!Number.isFinite(value)) { pen = "M"; return; }
      // A point without neighbours would be a path of no length, which is drawn as a dot.
      path += `${pen}${x(i).toFixed(1)} ${y(value).toFixed(1)}${pen === "M" ? "h0" : ""}`;
      pen = "L";
    });
    const own = svg("path", { d: path, fill: "none", "stroke-width": line.dashed ? 1.5 : 2, "stroke-linejoin": "round", "stroke-linecap": "round", ...(line.dashed ? { "stroke-dasharray": "4 3" } : {}) });
    own.style.stroke = line.colour;
    figure.append(own);
    if (Number.isFinite(line.values[line.at])) {
      const dot = svg("circle", { cx: x(line.at), cy: y(line.values[line.at]), r: line.dashed ? 2.5 : 3.5 });
      dot.style.fill = line.colour;
      figure.append(dot);
    }
  }
  return figure;
}

const page = new Page();
page.open().catch((error) => {
  document.body.replaceChildren(h("p", { class: "problem", role: "alert" }, error.message));
  document.documentElement.dataset.ready = "problem";
});
