"""What of an audit can be looked at: pictures on its page, and saved beside its JSON."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from brittle.reporting.page import report_html
from brittle.reporting.pictures import attacked_rows, direction_pictures, universal_pictures
from brittle.results import Audit, Pictures
from helpers.audits import INF, data_free, full, one_layer

BOUNDS = np.array([0.0, 1.0])


def pictures(channels=1) -> Pictures:
    """Two samples under l_inf attack, one of which changed its class, and one perturbation."""
    x = np.full((2, channels, 4, 4), 0.5, dtype=np.float32)
    change = np.zeros_like(x)
    change[:, :, 0, 0], change[:, :, 3, 3] = 0.25, -0.25
    return Pictures(
        bounds=BOUNDS, norms=np.array([INF, INF]), index=np.array([3, 8]), label=np.array([7, 1]),
        clean_prediction=np.array([7, 1]), adversarial_prediction=np.array([9, 1]), x=x, x_adv=x + change,
        layer="conv1", directions=np.eye(4, dtype=np.float32).reshape(4, 1, 2, 2).repeat(channels, axis=1),
        gains=np.array([4.0, 3.0, 2.0, 1.0]), universal=change[:1], universal_norms=np.array([INF]),
    )  # fmt: skip


def pixels(picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.png.partition("base64,")[2]))))


def shown(channels=1) -> Audit:
    return replace(full(), pictures=pictures(channels))


def test_a_sample_its_perturbation_and_the_attacked_sample_stand_in_a_row_with_classes_and_factor():
    rows = attacked_rows(shown())
    assert list(rows) == [INF]
    before, change, after = rows[INF][0].pictures
    assert [rows[INF][0].title, before.caption, change.caption, after.caption] == [
        "Sample 3, class 7", "taken for 7", "perturbation × 2.00", "is taken for 9",
    ]  # fmt: skip
    assert rows[INF][1].pictures[2].caption == "is still taken for 1"
    assert pixels(before).tolist() == [[128] * 4] * 4
    assert [pixels(after)[0, 0], pixels(after)[3, 3]] == [191, 64]


def test_what_has_signs_is_blue_below_zero_and_red_above():
    change = pixels(attacked_rows(shown())[INF][0].pictures[1])
    (red, _, blue), (red_below, _, blue_below) = change[0, 0].astype(int), change[3, 3].astype(int)
    assert red > blue + 50
    assert blue_below > red_below + 50
    assert np.ptp(change[1, 1].astype(int)) < 5  # nothing is without colour
    assert pixels(attacked_rows(shown(3))[INF][0].pictures[1])[1, 1].tolist() == [128] * 3


def test_directions_and_universal_perturbations_have_their_pictures():
    assert [picture.caption for picture in direction_pictures(shown())] == [f"gain {g}.00" for g in (4, 3, 2, 1)]
    (universal,) = universal_pictures(shown())
    assert universal.caption == "ℓ∞, changes 30.7 % of the predictions"
    assert attacked_rows(full()) == {}
    assert direction_pictures(full()) == universal_pictures(full()) == []


def test_the_page_holds_its_pictures_and_no_picture_from_elsewhere():
    audit = replace(one_layer(), norms=full().norms[:1], pictures=pictures())
    page = report_html(audit)
    sources = re.findall(r'<img src="([^"]*)" alt="([^"]+)"', page)
    assert len(sources) == page.count("<img") == 2 * 3 + 1 + 4
    assert all(source.startswith("data:image/png;base64,") for source, _ in sources)
    assert "img-src data:;" in page
    assert "What the first layer looks at" in page
    assert "<img" not in report_html(replace(audit, pictures=None))


def test_pictures_are_saved_beside_the_json_and_come_back_with_their_audit_alone(tmp_path):
    audit = shown()
    audit.save(tmp_path / "audit.json")
    assert {path.name for path in tmp_path.iterdir()} == {"audit.json", "audit.npz"}
    assert "pictures" not in (tmp_path / "audit.json").read_text()
    back = Audit.load(tmp_path / "audit.json")
    assert back == audit
    for name, value in vars(audit.pictures).items():
        assert np.array_equal(getattr(back.pictures, name), value)
    data_free().save(tmp_path / "audit.json")  # of another network: the file beside is not its own
    assert Audit.load(tmp_path / "audit.json").pictures is None


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_a_file_beside_the_json_that_holds_no_pictures_is_passed_over(tmp_path, content):
    data_free().save(tmp_path / "audit.json")
    (tmp_path / "audit.npz").write_bytes(content)
    assert Audit.load(tmp_path / "audit.json") == data_free()


def test_arrays_of_other_shapes_are_no_pictures(tmp_path):
    audit = replace(full(), pictures=replace(pictures(), x_adv=np.zeros((2, 1, 4, 5), dtype=np.float32)))
    audit.save(tmp_path / "audit.json")
    assert Audit.load(tmp_path / "audit.json").pictures is None
