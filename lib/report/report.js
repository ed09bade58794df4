document.querySelectorAll(".stepper").forEach(box => {
  const frames = JSON.parse(box.dataset.frames), slider = box.querySelector("input");
  slider.addEventListener("input", () => {
    box.querySelector("pre").innerHTML = frames[slider.value];
    box.querySelector("output").textContent = Number(slider.value) + 1;
  });
});
