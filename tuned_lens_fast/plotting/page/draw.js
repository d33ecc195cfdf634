// Colours and drawing: a view of a run goes through a pen, onto a canvas or into SVG. Only what is in sight is drawn.

const SCALES = {
  viridis: "440154 471365 482475 463480 414487 3b528b 355f8d 2f6c8e 2a788e 25848e 21918c 1e9c89 22a884 2fb47c "
    + "44bf70 5ec962 7ad151 9bd93c bddf26 dfe318 fde725",
  cividis: "00224e 002b62 083370 243c6e 35456c 434e6c 4f576c 5b606e 666970 727274 7d7c78 888578 948e77 a19975 "
    + "aea371 bcae6c c8b866 d6c35d e5cf52 f3db42 fee838",
  blues: "f5f9fe e3eef9 cfe1f2 b5d4e9 93c3df 6daed5 4b97c9 2f7ebc 1864aa 0a4a90 08306b",
  greys: "fafafa e6e6e6 d2d2d2 bebebe aaaaaa 969696 808080 6a6a6a 545454 3c3c3c 222222",
};
const DIVERGING = {
  light: "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fdddc0 fdb863 e08214 b35806 7f3b08",
  dark: "9ecbff 6aaef0 4393d8 2a6aa6 234466 2b2f36 5e421f 9a5f16 d0801f f0a54a ffd08a",
};
/** Okabe and Ito's colours, which all kinds of colour vision tell apart. */
const PINS = ["#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#f0e442"];
const SANS = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Noto Sans', 'DejaVu Sans', sans-serif";

/** 256 colours and the ink that reads on each. */
function table(stops) {
  const rgb = stops.split(" ").map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (rgb.length - 1), low = Math.min(Math.floor(at), rgb.length - 2);
    const [r, g, b] = rgb[low].map((c, j) => Math.round(c + (at - low) * (rgb[low + 1][j] - c)));
    const luminance = 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    return { fill: `rgb(${r},${g},${b})`, ink: luminance > 0.179 ? "#111111" : "#ffffff" };
  });
}

const tables = new Map();
function colours(stops) {
  if (!tables.has(stops)) tables.set(stops, table(stops));
  return tables.get(stops);
}

/** How a statistic of a run becomes a colour: `at(value)` is its place in `colours`. */
function colouring(run, statistic, scale, theme) {
  if (run.pair) {
    const span = run.span(statistic);
    return { colours: colours(DIVERGING[theme]), low: -span, high: span, log: false, at: (v) => 127.5 + (127.5 * v) / span };
  }
  const { low, high, log } = statistic, width = high - low;
  // Of ranks the first is the bright end, as is the highest probability.
  const at = log ? (v) => 255 - (255 * (Math.log10(v) - low)) / width : (v) => (255 * (v - low)) / width;
  return { colours: colours(SCALES[scale]), low, high, log, at };
}

const clamped = (at) => (at <= 0 ? 0 : at >= 255 ? 255 : Math.round(at));

/** Three digits, as many as are kept. */
function shown(value, statistic) {
  if (value === undefined) return "…";
  if (value === null) return "–";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  if (statistic?.name === "rank" && Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  const text = size >= 1000 ? Math.round(value).toLocaleString("en") : size >= 0.001 || !size
    ? String(Number(value.toPrecision(3))) : value.toExponential(1);
  return text.replace("-", "−");
}

class CanvasPen {
  constructor(context, ratio) {
    this.context = context;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.textBaseline = "middle";
    context.direction = "ltr";
  }

  rect(x, y, width, height, fill) {
    const { context } = this;
    if (this.fill !== fill) context.fillStyle = this.fill = fill;
    context.fillRect(x, y, width, height);
  }

  frame(x, y, width, height, stroke, thick) {
    this.context.strokeStyle = stroke;
    this.context.lineWidth = thick;
    this.context.strokeRect(x + thick / 2, y + thick / 2, width - thick, height - thick);
  }

  line(x0, y0, x1, y1, stroke, thick) {
    const { context } = this;
    context.strokeStyle = stroke;
    context.lineWidth = thick;
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    context.stroke();
  }

  /** `align`: left, center or right. `y` is the middle. */
  text(text, x, y, fill, size, bold, align) {
    const { context } = this, font = `${bold ? "600" : "400"} ${size}px ${SANS}`;
    if (this.font !== font) context.font = this.font = font;
    if (this.fill !== fill) context.fillStyle = this.fill = fill;
    if (this.align !== align) context.textAlign = this.align = align;
    context.fillText(text, x, y);
  }

  /** What `draw` draws is cut at the rectangle's edge. */
  within(x, y, width, height, draw) {
    this.context.save();
    this.context.beginPath();
    this.context.rect(x, y, width, height);
    this.context.clip();
    draw();
    this.context.restore();
    this.font = this.fill = this.align = undefined;
  }
}

const MARKUP = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escaped = (text) => text.replace(/[&<>"']/g, (char) => MARKUP[char]);

class SvgPen {
  constructor(width, height) { Object.assign(this, { width, height, parts: [], clips: 0 }); }

  rect(x, y, width, height, fill) {
    this.parts.push(`<rect x="${x}" y="${y}" width="${width}" height="${height}" fill="${fill}"/>`);
  }

  frame(x, y, width, height, stroke, thick) {
    this.parts.push(`<rect x="${x + thick / 2}" y="${y + thick / 2}" width="${width - thick}" height="${height - thick}" `
      + `fill="none" stroke="${stroke}" stroke-width="${thick}"/>`);
  }

  line(x0, y0, x1, y1, stroke, thick) {
    this.parts.push(`<path d="M${x0} ${y0}L${x1} ${y1}" stroke="${stroke}" stroke-width="${thick}"/>`);
  }

  text(text, x, y, fill, size, bold, align) {
    const anchor = { left: "start", center: "middle", right: "end" }[align];
    this.parts.push(`<text x="${x}" y="${y}" fill="${fill}" font-size="${size}" font-weight="${bold ? 600 : 400}" `
      + `text-anchor="${anchor}" dominant-baseline="central">${escaped(text)}</text>`);
  }

  within(x, y, width, height, draw) {
    const id = `clip${this.clips++}`;
    this.parts.push(`<clipPath id="${id}"><rect x="${x}" y="${y}" width="${width}" height="${height}"/></clipPath>`
      + `<g clip-path="url(#${id})">`);
    draw();
    this.parts.push("</g>");
  }

  toString() {
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${this.width}" height="${this.height}" `
      + `viewBox="0 0 ${this.width} ${this.height}" font-family="${escaped(SANS)}">${this.parts.join("\n")}</svg>\n`;
  }
}

const measuring = document.createElement("canvas").getContext("2d");
const fits = new Map();
/** `text` cut with an ellipsis to `width` pixels. */
function fitted(text, width, size, bold) {
  const key = `${bold ? 1 : 0} ${size} ${width} ${text}`;
  let cut = fits.get(key);
  if (cut !== undefined) return cut;
  measuring.font = `${bold ? "600" : "400"} ${size}px ${SANS}`;
  cut = text;
  if (measuring.measureText(text).width > width) {
    const chars = Array.from(text.slice(0, 200));
    let low = 0, high = chars.length;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (measuring.measureText(`${chars.slice(0, middle).join("")}…`).width <= width) low = middle; else high = middle - 1;
    }
    cut = low ? `${chars.slice(0, low).join("")}…` : "";
  }
  if (fits.size > 50000) fits.clear();
  fits.set(key, cut);
  return cut;
}

const HEAD = 42, LABELS = 58, GAP = 4;

/** Where a row begins, below the head. The last is set apart: no lens's reading but what the model says. */
const rowTop = (view, i) => i * view.rowHeight + (i === view.rows.length - 1 && i ? GAP : 0);
const rowsHeight = (view) => view.rows.length * view.rowHeight + (view.rows.length > 1 ? GAP : 0);

/** The row and position under a point of the pane, or null. */
function cellAt(view, x, y) {
  if (x < LABELS || y < HEAD) return null;
  const position = Math.floor((x - LABELS + view.left) / view.cell);
  const down = y - HEAD + view.top, last = view.rows.length - 1;
  let i = Math.floor(down / view.rowHeight);
  if (i >= last) i = down >= rowTop(view, last) && down < rowTop(view, last) + view.rowHeight ? last : i === last ? last : -1;
  return i >= 0 && position >= 0 && position < view.run.positions ? { layer: view.rows[i], position } : null;
}

/** Positions in sight, from the first to before the last. */
const inSight = (view) => [
  Math.max(0, Math.floor(view.left / view.cell)),
  Math.min(view.run.positions, Math.ceil((view.left + view.width - LABELS) / view.cell)),
];

function hatched(pen, x, y, width, height, palette) {
  pen.rect(x, y, width, height, palette.blank);
  for (let at = 4; at < width + height; at += 6) {
    const x0 = Math.max(0, at - height), x1 = Math.min(at, width);
    pen.line(x + x0, y + at - x0, x + x1, y + at - x1, palette.hatch, 1);
  }
}

/** One pane. `view`: run, statistic, colouring, rows, cell, rowHeight, left, top, width, height, values, marks, found
 *  (positions), pins, hover, cursor, palette, texts. */
function drawPane(pen, view) {
  const { run, statistic, colouring: by, rows, cell, rowHeight, left, top, width, height, palette, texts } = view;
  const [from, to] = inSight(view), last = rows.length - 1;
  const size = Math.min(12, rowHeight - 6), gap = cell >= 12 ? 1 : 0, written = cell >= 30 && size >= 7;
  const x = (position) => LABELS + position * cell - left, y = (i) => HEAD + rowTop(view, i) - top;
  pen.rect(0, 0, width, height, palette.ground);

  pen.within(LABELS, HEAD, width - LABELS, height - HEAD, () => {
    const words = [];
    for (let i = 0; i <= last; i++) {
      const layer = rows[i], at = y(i);
      if (at + rowHeight < HEAD || at > height) continue;
      for (let position = from; position < to; position++) {
        const value = run.value(statistic, layer, position), cx = x(position);
        const w = cell - gap, h = rowHeight - gap;
        let ink = palette.ink;
        if (value === undefined) { pen.rect(cx, at, w, h, palette.blank); continue; }
        if (value === null) pen.rect(cx, at, w, h, palette.blank);
        else if (!Number.isFinite(value)) hatched(pen, cx, at, w, h, palette);
        else {
          const colour = by.colours[clamped(by.at(value))];
          pen.rect(cx, at, w, h, colour.fill);
          ink = colour.ink;
        }
        if (!written) continue;
        let text, bold = false;
        if (view.values || !run.k) text = shown(value, statistic);
        else {
          const token = run.top(layer, position);
          bold = token === run.target[position];
          text = texts[token] ?? "";
          if (run.pair) {
            const other = run.otherTop(layer, position);
            if (other !== token) text = `${text} | ${texts[other] ?? ""}`;
          }
        }
        words.push([ink, bold, text, cx, at]);
      }
    }
    // All words of one ink and weight in turn: a canvas is slow to change both.
    words.sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1]));
    for (const [ink, bold, text, cx, at] of words) {
      pen.text(fitted(text, cell - 8, size, bold), cx + (cell - gap) / 2, at + (rowHeight - gap) / 2 + 0.5, ink, size, bold, "center");
    }
    if (view.marks && run.k && cell >= 12) drawFirstAnswers(pen, view, from, to, x, y);
    for (const pin of view.pins) {
      const i = rows.indexOf(pin.layer);
      if (i >= 0) {
        pen.frame(x(pin.position) - 2, y(i) - 2, Math.max(cell, 6) + 3, rowHeight + 3, palette.ground, 4.5);
        pen.frame(x(pin.position) - 2, y(i) - 2, Math.max(cell, 6) + 3, rowHeight + 3, pin.colour, 3);
      }
    }
    for (const [at, thick] of [[view.hover, 1.5], [view.cursor, 2]]) {
      const i = at ? rows.indexOf(at.layer) : -1;
      if (i < 0) continue;
      const w = Math.max(cell, 6) + 1, h = rowHeight + 1;
      pen.frame(x(at.position) - 1, y(i) - 1, w, h, palette.ground, 1 + thick);
      pen.frame(x(at.position) - 1, y(i) - 1, w, h, palette.ink, thick);
    }
  });

  pen.within(LABELS, 0, width - LABELS, HEAD, () => {
    const every = cell >= 44 ? 1 : 10 ** Math.ceil(Math.log10(44 / cell)) / (cell * 5 * 10 ** (Math.ceil(Math.log10(44 / cell)) - 1) >= 44 ? 2 : 1);
    for (let position = from; position < to; position++) {
      const middle = x(position) + (cell - gap) / 2, here = view.hover?.position === position || view.cursor?.position === position;
      if (view.found.has(position)) pen.rect(x(position), 18, Math.max(cell - gap, 2), HEAD - 21, palette.found);
      if (position % every === 0) pen.text(String(position), middle, 10, here ? palette.ink : palette.pale, 10, here, "center");
      if (cell >= 30 && run.read[position] >= 0) {
        const ink = view.found.has(position) ? palette.foundInk : palette.ink;
        pen.text(fitted(texts[run.read[position]], cell - 4, 12, true), middle, 29, ink, 12, true, "center");
      }
    }
    for (const pin of view.pins) pen.rect(x(pin.position), HEAD - 4, Math.max(cell - gap, 3), 3, pin.colour);
  });

  pen.within(0, HEAD, LABELS, height - HEAD, () => {
    for (let i = 0; i <= last; i++) {
      const here = [view.hover?.layer, view.cursor?.layer].includes(rows[i]);
      pen.text(run.layers[rows[i]], LABELS - 8, y(i) + rowHeight / 2, here ? palette.ink : palette.pale, Math.min(11, rowHeight - 5), here || rows[i] === run.layers.length - 1, "right");
    }
  });
  pen.text("layer", LABELS - 8, 29, palette.pale, 11, false, "right");
}

/** A step over the first cell of each column whose likeliest token is the output's. */
function drawFirstAnswers(pen, view, from, to, x, y) {
  for (let position = from; position < to; position++) {
    if (!view.run.loaded(position)) continue;
    const first = view.run.firstAnswer(position), i = view.rows.findIndex((layer) => layer >= first);
    if (i < 0) continue;
    pen.rect(x(position) - 1, y(i) - 2, view.cell + 1, 4, view.palette.ground);
    pen.rect(x(position) - 1, y(i) - 1.5, view.cell + 1, 2.5, view.palette.mark);
  }
}
