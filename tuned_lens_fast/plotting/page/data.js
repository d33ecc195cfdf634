// Where the numbers come from. `Embedded` finds the parts in the page itself, `Fetched` asks the server that the page came
// from. `Run` unpacks parts as they are needed; drawing asks it for numbers. The parts are those of encode.py.

const FORMAT = 1;

class Embedded {
  /** All blocks are unpacked and kept. */
  most = Infinity;

  /** The gzipped bytes of a part. */
  async part(name) {
    const element = document.getElementById(name), text = element.textContent.trim();
    element.remove(); // a part is asked for once, and is as large in the document as unpacked
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    return Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  }
}

class Fetched {
  /** Blocks that are kept; the oldest go. */
  most = 48;

  async part(name) {
    const answer = await fetch(`part/${name}`).catch(() => null);
    if (!answer?.ok) throw new Error("The server of this page does not answer any more: start it again, and open the address that it prints.");
    return new Uint8Array(await answer.arrayBuffer());
  }
}

async function unpacked(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Takes arrays off unpacked bytes, one after the other. */
class Reader {
  constructor(bytes) { this.bytes = bytes; this.at = 0; }

  words(count) {
    const { bytes, at } = this, words = new Uint32Array(count);
    for (let i = 0; i < count; i++) {
      words[i] = (bytes[at + i] << 24) | (bytes[at + count + i] << 16) | (bytes[at + 2 * count + i] << 8)
        | bytes[at + 3 * count + i];
    }
    this.at += 4 * count;
    return words.buffer;
  }

  floats(count) { return new Float32Array(this.words(count)); }
  ints(count) { return new Int32Array(this.words(count)); }
}

/** One decoded text. Layers are rows from 0 here, whatever they are called. */
class Run {
  constructor(source, index, info, block) {
    Object.assign(this, info, { source, index, block });
    this.statistics = [...info.statistics];
    info.watched.forEach((token, i) => this.statistics.push({
      name: `watch${i}`, watch: i, token, called: info.watchedNames[i] ?? `watched ${i + 1}`,
      label: "", title: "", low: -12, high: 0, log: false, changes: [],
    }));
    this.blocks = [];
    this.loading = [];
    this.kept = [];
  }

  async open() {
    const reader = new Reader(await unpacked(await this.source.part(`text-${this.index}`)));
    this.read = reader.ints(this.positions);
    this.target = reader.ints(this.positions);
  }

  get blockCount() { return Math.ceil(this.positions / this.block); }

  /** Resolves when the block that holds `position` is there. */
  load(position) {
    const i = Math.floor(position / this.block);
    return (this.loading[i] ??= this.#load(i).catch((error) => { delete this.loading[i]; throw error; }));
  }

  async #load(i) {
    const reader = new Reader(await unpacked(await this.source.part(`block-${this.index}-${i}`)));
    const width = Math.min(this.block, this.positions - i * this.block), size = this.layers.length * width;
    const block = { width };
    for (const { name, watch } of this.statistics) {
      if (watch === undefined) block[name] = name === "rank" ? reader.ints(size) : reader.floats(size);
    }
    const each = (all) => Array.from({ length: all.length / size }, (_, at) => all.subarray(at * size, (at + 1) * size));
    each(reader.floats(this.watched.length * size)).forEach((values, w) => { block[`watch${w}`] = values; });
    block.logProbs = each(reader.floats(this.k * size));
    block.tops = each(reader.ints(this.k * size));
    this.blocks[i] = block;
    this.kept.push(i);
    if (this.kept.length > this.source.most) {
      const old = this.kept.shift();
      delete this.blocks[old];
      delete this.loading[old];
    }
  }

  loaded(position) { return this.blocks[Math.floor(position / this.block)] !== undefined; }

  #at(array, layer, position) {
    const block = this.blocks[Math.floor(position / this.block)];
    return block && array(block)?.[layer * block.width + (position % this.block)];
  }

  /** undefined where it is not loaded; null where there is no target for it. */
  value(statistic, layer, position) {
    if (statistic.ofTarget && this.target[position] < 0) return null;
    return this.#at((block) => block[statistic.name], layer, position);
  }

  /** The number of the token that is i-th likeliest, from 0. */
  top(layer, position, i = 0) { return this.#at((block) => block.tops[i], layer, position); }
  logProb(layer, position, i = 0) { return this.#at((block) => block.logProbs[i], layer, position); }

  /** The log-probability of a token at a layer, where it is known: the target's, a watched one's, one of the top k. */
  logProbOf(token, layer, position) {
    if (token === this.target[position]) {
      const value = this.#at((block) => block.log_prob, layer, position);
      if (value !== undefined) return value;
    }
    const watched = this.watched.indexOf(token);
    if (watched >= 0) return this.#at((block) => block[`watch${watched}`], layer, position);
    for (let i = 0; i < this.k; i++) {
      if (this.top(layer, position, i) === token) return this.logProb(layer, position, i);
    }
    return undefined;
  }

  /** The first layer whose likeliest token is the output's. */
  firstAnswer(position) {
    const last = this.layers.length - 1, answer = this.top(last, position);
    for (let layer = 0; layer <= last; layer++) if (this.top(layer, position) === answer) return layer;
    return last;
  }
}

/** A minus B: layers of the same name, positions that both have. */
class Difference {
  constructor(a, b) {
    this.name = `${a.name} − ${b.name}`;
    this.pair = [a, b];
    const there = new Map(b.layers.map((name, row) => [name, row]));
    this.rows = a.layers.map((name, row) => [row, there.get(name)]).filter(([, row]) => row !== undefined);
    this.layers = this.rows.map(([row]) => a.layers[row]);
    this.positions = Math.min(a.positions, b.positions);
    const shared = new Map(b.statistics.map((s) => [s.name, s]));
    this.statistics = a.statistics.filter((s) => shared.has(s.name) && s.token === shared.get(s.name).token && s.called === shared.get(s.name).called);
    this.k = Math.min(a.k, b.k);
    this.spans = {};
    Object.assign(this, { read: a.read, target: a.target });
  }

  loaded(position) { return this.pair.every((run) => run.loaded(position)); }
  load(position) { return Promise.all(this.pair.map((run) => run.load(position))); }

  value(statistic, layer, position) {
    const [a, b] = this.pair.map((run, i) => run.value(statistic, this.rows[layer][i], position));
    if (a === undefined || b === undefined) return undefined;
    if (a === null || b === null) return null;
    return statistic.log ? Math.log10(a) - Math.log10(b) : a - b;
  }

  top(layer, position, i = 0) { return this.pair[0].top(this.rows[layer][0], position, i); }
  otherTop(layer, position) { return this.pair[1].top(this.rows[layer][1], position); }
  firstAnswer(position) {
    const layer = this.pair[0].firstAnswer(position), row = this.rows.findIndex(([a]) => a >= layer);
    return row < 0 ? this.rows.length - 1 : row;
  }

  /** Half the width of the colours: 96% of the differences of what is loaded are within. */
  span(statistic) {
    if (this.spans[statistic.name]) return this.spans[statistic.name];
    const found = [];
    const step = Math.max(1, Math.floor((this.positions * this.layers.length) / 200000));
    for (let at = 0; at < this.positions * this.layers.length; at += step) {
      const value = this.value(statistic, at % this.layers.length, Math.floor(at / this.layers.length));
      if (Number.isFinite(value)) found.push(Math.abs(value));
    }
    found.sort((x, y) => x - y);
    const span = found.length ? Math.max(found[Math.floor(0.96 * (found.length - 1))], 1e-3) : 1;
    // What is computed before all is there is not kept.
    if (this.pair.every((run) => run.blocks.filter(Boolean).length === run.blockCount)) this.spans[statistic.name] = span;
    return span;
  }
}
