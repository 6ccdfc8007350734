import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure
from matplotlib.image import imread

from mnist_exp.figures.curves import learning_curves
from mnist_exp.figures.images import sample_grid
from mnist_exp.figures.matrices import confusion_matrix
from mnist_exp.figures.style import DPI, pixels, save
from tests.figures.drawn import DIGITS, counts, find, noise

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("has_pyplot", [False, True])
def test_a_figure_shows_itself_in_a_notebook(has_pyplot: bool, tmp_path: Path) -> None:
    figure = sample_grid(noise(3), ["1", "2", "3"], title="x")
    formatter = DisplayFormatter()
    if has_pyplot:  # which leaves it to IPython to draw figures, and that draws none without axes
        formatter.formatters["image/png"].for_type(Figure, lambda figure: None)
    data, _ = formatter.format(figure)
    save(figure, tmp_path / "a.png")
    assert data["image/png"] == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(("dpi", "scale"), [(DPI, 5), (2 * DPI, 10)])
def test_pixels_stay_in_place_in_a_file_that_is_cut_or_finer(
    dpi: int, scale: int, tmp_path: Path
) -> None:
    image, frame = noise(1), 60
    figure = sample_grid(image, ["1"], ["2"], title="x")
    whole = pixels(figure)
    figure.savefig(tmp_path / "a.png", dpi=dpi, bbox_inches="tight", pad_inches=frame / DPI)
    from_file = np.round(imread(tmp_path / "a.png")[..., :3] * 255).astype(np.uint8)
    large = np.kron(image[0], np.ones((scale, scale), np.uint8))
    y, x = find(from_file[..., 1], large)
    more = scale // 5
    y_whole, x_whole = find(whole[..., 1], np.kron(image[0], np.ones((5, 5), np.uint8)))
    assert abs(y - more * (y_whole + frame)) <= more and abs(x - more * (x_whole + frame)) <= more


def test_fonts_go_with_the_file(tmp_path: Path) -> None:
    figure = sample_grid(noise(1), ["7"], ["1"], title="x")
    save(figure, tmp_path / "a.pdf")
    save(figure, tmp_path / "a.svg")
    pdf, svg = ((tmp_path / f"a.{kind}").read_bytes() for kind in ("pdf", "svg"))
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType
    assert b"<text" not in svg and b"<image" in svg


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_files_are_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    for name, labels in (("a", ["1", "2"]), ("b", ["1", "2"]), ("c", ["1", "3"])):
        save(sample_grid(noise(2), labels, title="x"), tmp_path / f"{name}.{suffix}")
    first, same, other = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert first == same != other
    assert b"matplotlib.org" not in first or suffix != "png"


def test_png_has_the_pixels(tmp_path: Path) -> None:
    figure = sample_grid(noise(3), ["1", "2", "3"], ["1", "2", "2"], title="x")
    save(figure, tmp_path / "a.png")
    from_file = imread(tmp_path / "a.png")[..., :3]
    assert np.array_equal(np.round(from_file * 255).astype(np.uint8), pixels(figure))


def test_save_refuses_other_suffixes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'\.jpg', .*\.png, \.svg, \.pdf"):
        save(learning_curves({}, None, "x"), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_style_is_put_back_and_threads_agree() -> None:
    before = dict(matplotlib.rcParams)
    pictures = []

    def draw() -> None:
        pictures.append(pixels(confusion_matrix(counts(10), DIGITS, "x")))

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pictures) == 4
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported() -> None:
    program = (
        "import sys, numpy as np; from mnist_exp.figures import curves, images, matrices, style;"
        "style.pixels(images.sample_grid(np.zeros((1, 4, 4), np.uint8), ['1'], title='x'));"
        "style.pixels(curves.learning_curves({}, 1, 'x'));"
        "assert not {'matplotlib.pyplot', 'torch', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


@pytest.mark.parametrize("name", ["数", "\ufeff", "\u202eabc", "\udcff", "\x1b[31m", "<b>&"])
@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_a_name_of_odd_characters(name: str, suffix: str, tmp_path: Path) -> None:
    """Without a warning, which is an error here, as of characters that the font has not."""
    figure = sample_grid(noise(2), [name, "字"], title=name)
    assert pixels(figure).std() > 0
    save(figure, tmp_path / f"a.{suffix}")
