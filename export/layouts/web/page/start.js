"use strict";
// A classic script: it runs where modules cannot, and says why they cannot.

function showFailure(message) {
  const show = () => {
    document.getElementById("failure-text").textContent = message;
    document.getElementById("failure").hidden = false;
    for (const id of ["loading", "ask", "examples"]) document.getElementById(id).hidden = true;
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", show);
  else show();
}

// The smallest module with a SIMD instruction, as browsers have had since 2021 (Safari 2023).
const SIMD_MODULE = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
]);

function missingFeatures() {
  const missing = [];
  if (typeof WebAssembly !== "object") missing.push("WebAssembly");
  else if (!WebAssembly.validate(SIMD_MODULE)) missing.push("WebAssembly SIMD");
  if (typeof Worker !== "function") missing.push("workers");
  if (typeof Intl !== "object" || !Intl.Segmenter) missing.push("Intl.Segmenter");
  if (typeof DecompressionStream !== "function") missing.push("DecompressionStream");
  return missing;
}

// Set by app.js when it runs; a script that is missing or cut short is told by the error event.
window.babeltower = { running: false, failed: false, showFailure };

(function () {
  const fail = (message) => {
    window.babeltower.failed = true;
    showFailure(message);
  };
  if (location.protocol === "file:") {
    fail(
      "The page was opened as a file, and browsers do not let files load other files. Serve its folder: run " +
        "“python -m http.server” in it, and open http://localhost:8000/. Any static host will do as well.",
    );
    return;
  }
  const missing = missingFeatures();
  if (missing.length) {
    fail("This browser lacks " + missing.join(", ") + ". Open the page in a current version of Chrome, Edge, Firefox or Safari.");
    return;
  }
  window.addEventListener(
    "error",
    (event) => {
      if (window.babeltower.failed || window.babeltower.running) return;
      const from = event.target && event.target.src;
      if (from) fail("The file " + from.split("?")[0] + ", or one that it imports, is missing or damaged. Copy the whole folder to the host again.");
      else if (event.message) fail("The page is damaged: " + event.message + ". Copy the whole folder to the host again.");
    },
    true,
  );
})();
