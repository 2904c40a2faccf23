// What the page shows, around a translator.

import { Translator } from "./translator.mjs";

const [form, text, button, state, translation] = [
  "form", "#text", "button", "#state", "#translation",
].map((name) => document.querySelector(name));

async function start() {
  let ort;
  try {
    ort = await import("./onnxruntime/ort.wasm.bundle.min.mjs");
  } catch (error) {
    throw new Error(`expected onnxruntime-web in the folder onnxruntime (${error.message})`);
  }
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
  const translator = await Translator.open("model", ort, (name) => {
    state.textContent = `loading ${name}`;
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    const [begin, written] = [performance.now(), []];
    try {
      for (const line of text.value.split("\n")) {
        state.textContent = `translating line ${written.length + 1}`;
        written.push(line.trim() && (await translator.translate(line)));
        translation.value = written.join("\n");
      }
      state.textContent = `${((performance.now() - begin) / 1000).toFixed(1)} seconds`;
    } catch (error) {
      state.textContent = error.message;
    }
    button.disabled = false;
  });
  state.textContent = "ready";
  button.disabled = false;
}

start().catch((error) => {
  state.textContent = error.message;
});
