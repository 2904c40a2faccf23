// Translates with a folder of ONNX files, as `fairseq-kd-export --format transformers` and optimum
// make it: SentencePiece, the symbols' numbers, and greedy search, without a server.

const SPACE = "\u2581"; // what SentencePiece writes for a space
const [UNIGRAM, BPE, CHAR] = [1, 2, 4];
const [NORMAL, USER_DEFINED, UNUSED, BYTE] = [1, 4, 5, 6];

/** The fields of a protobuf message: [number, value], of bytes, numbers and 32-bit floats. */
function* fields(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 0;
  const varint = () => {
    for (let value = 0, scale = 1; ; scale *= 128) {
      const byte = view.getUint8(at++);
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const [number, kind] = [Math.floor(tag / 8), tag % 8];
    if (kind === 0) yield [number, varint()];
    else if (kind === 1) at += 8;
    else if (kind === 5) yield [number, view.getFloat32((at += 4) - 4, true)];
    else if (kind === 2) {
      const length = varint();
      yield [number, bytes.subarray(at, (at += length))];
    } else throw new Error("this is no SentencePiece model: its protobuf cannot be read");
  }
}

/** SentencePiece's own segmentation, from its model file. */
export class SentencePiece {
  #scores = new Map(); // of the pieces that it may write
  #bytes = new Set(); // pieces of single bytes, if it falls back to them
  #kind = UNIGRAM;
  #longest = 1; // characters of a piece
  #unknown; // score of a character that no piece has
  #trie = new Uint32Array(); // of what is replaced, a double array as Darts writes it
  #replacements = new Uint8Array(); // each ended by a zero byte
  #prefixed = true;
  #spaces_removed = true;

  constructor(model) {
    const text = new TextDecoder();
    let [odd, fallback, lowest] = [0, false, Infinity];
    for (const [number, message] of fields(model)) {
      if (number === 1) {
        const [piece, score, kind] = [...fields(message)].reduce(
          (all, [field, value]) => ((all[field - 1] = value), all),
          [new Uint8Array(), 0, NORMAL],
        );
        odd += kind === USER_DEFINED || kind === UNUSED;
        if (kind === BYTE) this.#bytes.add(text.decode(piece));
        if (kind !== NORMAL) continue;
        const written = text.decode(piece);
        this.#scores.set(written, score);
        this.#longest = Math.max(this.#longest, [...written].length);
        lowest = Math.min(lowest, score);
      } else if (number === 2) {
        for (const [field, value] of fields(message)) {
          if (field === 3) this.#kind = value;
          if (field === 24) odd += value;
          if (field === 35) fallback = Boolean(value);
        }
      } else if (number === 3) {
        for (const [field, value] of fields(message)) {
          if (field === 2 && value.length) this.#read_replacements(value);
          if (field === 3) this.#prefixed = Boolean(value);
          if (field === 4) this.#spaces_removed = Boolean(value);
          if (field === 5) odd += !value;
        }
      }
    }
    if (odd || ![UNIGRAM, BPE, CHAR].includes(this.#kind)) {
      throw new Error(
        "expected a SentencePiece model of the kind bpe, unigram or char, with spaces as prefixes " +
          "and without symbols that are user-defined or unused",
      );
    }
    if (!fallback) this.#bytes.clear();
    this.#unknown = Math.fround(lowest - 10);
  }

  /** Pieces of a text, for humans and dictionaries alike. */
  encode(text) {
    const characters = [...this.normalise(text)];
    const split = { [UNIGRAM]: this.#likeliest, [BPE]: this.#merged, [CHAR]: (all) => all };
    const pieces = [];
    let before = true; // whether the last piece is known
    for (const piece of split[this.#kind].call(this, characters)) {
      const known = this.#scores.has(piece);
      if (!known && this.#bytes.size) {
        for (const byte of new TextEncoder().encode(piece)) {
          pieces.push(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
        }
      } else if (known || before) pieces.push(piece);
      else pieces.push(pieces.pop() + piece); // unknown ones in a row are one
      before = known;
    }
    return pieces;
  }

  /** The text that is split: its characters replaced, its spaces marked. */
  normalise(text) {
    let rest = new TextEncoder().encode(text.toWellFormed?.() ?? text);
    const [space, mark] = [32, new TextEncoder().encode(SPACE)];
    const next = () => {
      const [replaced, length] = this.#replaced(rest);
      rest = rest.subarray(length);
      return replaced;
    };
    let first;
    do {
      if (!rest.length) return "";
      first = next();
    } while (this.#spaces_removed && first.length === 1 && first[0] === space);
    const written = this.#prefixed ? [...mark] : [];
    let after_space = this.#spaces_removed;
    for (let part = first; ; part = next()) {
      let start = 0;
      while (after_space && part[start] === space) start++;
      part = part.subarray(start);
      for (const byte of part) byte === space ? written.push(...mark) : written.push(byte);
      if (part.length) after_space = part[part.length - 1] === space;
      after_space &&= this.#spaces_removed;
      if (!rest.length) break;
    }
    const normalised = new TextDecoder("utf-8", { ignoreBOM: true }).decode(
      new Uint8Array(written),
    );
    return this.#spaces_removed ? normalised.replace(/\u2581+$/, "") : normalised;
  }

  #read_replacements(map) {
    const size = new DataView(map.buffer, map.byteOffset).getUint32(0, true);
    const copy = map.slice(4, 4 + size); // which begins at a multiple of four bytes
    this.#trie = new Uint32Array(copy.buffer);
    this.#replacements = map.subarray(4 + size);
  }

  /** What the longest beginning that is replaced becomes, or the first character; its bytes. */
  #replaced(bytes) {
    const offset = (unit) => (unit >>> 10) << ((unit & 512) >>> 6);
    let [found, length] = [-1, 0];
    if (this.#trie.length) {
      let node = offset(this.#trie[0]);
      for (let i = 0; i < bytes.length; i++) {
        node ^= bytes[i];
        const unit = this.#trie[node];
        if ((unit & 0x800000ff) !== bytes[i]) break;
        node ^= offset(unit);
        if (unit & 256) [found, length] = [this.#trie[node] & 0x7fffffff, i + 1];
      }
    }
    if (found >= 0) {
      const end = this.#replacements.indexOf(0, found);
      return [this.#replacements.subarray(found, end), length];
    }
    length = 1;
    while ((bytes[length] & 0xc0) === 0x80) length++;
    return [bytes.subarray(0, length), length];
  }

  /** The segmentation of the highest sum of scores. */
  #likeliest(characters) {
    const best = [{ score: 0 }];
    for (let start = 0; start < characters.length; start++) {
      const reach = (end, score) => {
        const sum = Math.fround(best[start].score + score);
        if (!best[end] || sum > best[end].score) best[end] = { score: sum, start };
      };
      let piece = "";
      for (let end = start + 1; end <= characters.length && end - start <= this.#longest; end++) {
        piece += characters[end - 1];
        if (this.#scores.has(piece)) reach(end, this.#scores.get(piece));
      }
      if (!this.#scores.has(characters[start])) reach(start + 1, this.#unknown);
    }
    const pieces = [];
    for (let end = characters.length; end > 0; end = best[end].start) {
      pieces.unshift(characters.slice(best[end].start, end).join(""));
    }
    return pieces;
  }

  /** Two neighbours become one, those of the highest score first. */
  #merged(characters) {
    const pieces = [...characters];
    for (;;) {
      let [best, where] = [-Infinity, -1];
      for (let i = 0; i + 1 < pieces.length; i++) {
        const score = this.#scores.get(pieces[i] + pieces[i + 1]);
        if (score > best) [best, where] = [score, i];
      }
      if (where < 0) return pieces;
      pieces.splice(where, 2, pieces[where] + pieces[where + 1]);
    }
  }
}

/** A model and its symbols. */
export class Translator {
  /** Opens the folder at an address. `ort` is the module of onnxruntime-web; `told` hears what is being loaded. */
  static async open(address, ort, told = () => {}) {
    const folder = new URL(`${address}`.replace(/\/?$/, "/"), document.baseURI);
    const load = async (...names) => {
      for (const name of names) {
        told(name);
        const answer = await fetch(new URL(name, folder));
        if (answer.ok) return new Uint8Array(await answer.arrayBuffer());
      }
      throw new Error(`expected the file ${names.join(" or ")} in ${folder}`);
    };
    const json = async (name) => JSON.parse(new TextDecoder().decode(await load(name)));
    const session = async (name) =>
      ort.InferenceSession.create(await load(`${name}.onnx`, `${name}_quantized.onnx`));
    const made = new Translator();
    made.ort = ort;
    made.config = await json("config.json");
    made.search = await json("generation_config.json");
    const tokenizer = await json("tokenizer_config.json");
    const two = tokenizer.separate_vocabs; // one dictionary for each side
    made.spm = new SentencePiece(await load(two ? "source.spm" : "sentencepiece.bpe.model"));
    made.numbers = new Map(Object.entries(await json("vocab.json")));
    made.unknown = made.numbers.get(tokenizer.unk_token);
    made.longest = tokenizer.model_max_length;
    made.symbols = [];
    const target = two ? Object.entries(await json("target_vocab.json")) : made.numbers;
    for (const [symbol, number] of target) made.symbols[number] = symbol;
    made.special = new Set(
      ["bos", "eos", "pad", "unk"].map((name) => tokenizer[`${name}_token`]).filter(Boolean),
    );
    made.encoder = await session("encoder_model");
    made.decoder = await session("decoder_model_merged");
    return made;
  }

  /** Numbers of a text's pieces, and of the end. */
  encode(text) {
    const numbers = this.spm.encode(text).map((one) => this.numbers.get(one) ?? this.unknown);
    return [...numbers.slice(0, this.longest - 1), this.config.eos_token_id];
  }

  decode(numbers) {
    const pieces = numbers.map((number) => this.symbols[number]);
    const written = pieces.filter((piece) => !this.special.has(piece)).join("");
    const characters = written.replace(/(<0x[0-9A-F]{2}>)+/g, (bytes) =>
      new TextDecoder().decode(Uint8Array.from(bytes.match(/[0-9A-F]{2}/g), (byte) => `0x${byte}`)),
    );
    return characters.replaceAll(SPACE, " ").trim();
  }

  /** A translation by greedy search. */
  async translate(text) {
    const integers = (values) =>
      new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const source = this.encode(text);
    const attention_mask = integers(source.map(() => 1));
    const encoded = await this.encoder.run({ input_ids: integers(source), attention_mask });
    const inputs = {
      encoder_hidden_states: encoded.last_hidden_state,
      encoder_attention_mask: attention_mask,
    };
    const { decoder_attention_heads: heads, decoder_layers: layers, d_model } = this.config;
    const nothing = new this.ort.Tensor(
      "float32", new Float32Array(d_model), [1, heads, 1, d_model / heads],
    );
    const states = [];
    for (let layer = 0; layer < layers; layer++) {
      for (const side of ["decoder", "encoder"]) {
        for (const part of ["key", "value"]) states.push(`${layer}.${side}.${part}`);
      }
    }
    for (const name of states) inputs[`past_key_values.${name}`] = nothing;
    const written = [this.search.decoder_start_token_id];
    const { eos_token_id: end, max_length, min_length = 0, suppress_tokens = [] } = this.search;
    while (written.length < max_length - 1) {
      const later = written.length > 1;
      inputs.input_ids = integers(written.slice(-1));
      inputs.use_cache_branch = new this.ort.Tensor("bool", [later], [1]);
      const found = await this.decoder.run(inputs);
      for (const name of states) {
        // those of the source are the first step's
        if (later && name.includes("encoder")) continue;
        inputs[`past_key_values.${name}`] = found[`present.${name}`];
      }
      const scores = Float32Array.from(found.logits.data);
      for (const number of suppress_tokens) scores[number] = -Infinity;
      if (written.length < min_length) scores[end] = -Infinity;
      const best = scores.reduce((top, score, i) => (score > scores[top] ? i : top), 0);
      if (best === end) break;
      written.push(best);
    }
    return this.decode(written.slice(1));
  }
}
