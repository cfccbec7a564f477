import numpy as np
import pytest

from dataio.draws import Box, Geometry, Photometric, cutmix_box, cutmix_partner, raw_words, uniforms
from dataio.spec import Perturbation

STRONG = Perturbation(jitter_p=0.8, grayscale_p=0.2, blur_p=0.5, cutmix_p=0.5)


def test_words_are_pinned_and_depend_on_everything():
    assert [int(word) for word in raw_words(2, 0, 0, "key", "geometry")] == GOLDEN
    assert raw_words(3, 0, 0, "key")[:2].tolist() == raw_words(2, 0, 0, "key").tolist()
    identities = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, "a", "x"), ("0", 0, "a")]
    assert len({int(raw_words(1, *identity)[0]) for identity in identities}) == len(identities)


GOLDEN = [10749194197942786875, 1642959983588559442]


def test_numpy_integers_are_refused():
    with pytest.raises(TypeError):
        raw_words(1, np.int64(3))


def test_uniforms_are_uniform():
    values = np.array([uniforms(4, 0, 0, str(i)) for i in range(2000)])
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1
    assert np.allclose(values.mean(0), 0.5, atol=0.03)


def test_geometry_is_the_short_side_resize_then_a_square_crop():
    for i in range(300):
        height, width = 300 + i, 800 - i
        g = Geometry.draw(STRONG, 112, height, width, (0, 0, str(i)))
        assert min(g.height, g.width) == 112
        assert max(g.height, g.width) == pytest.approx(112 * max(height, width) / min(height, width), abs=0.5)
        assert 0 <= g.top <= g.height - 112
        assert 0 <= g.left <= g.width - 112


def test_geometry_of_the_right_size_is_not_resampled():
    assert {(g.height, g.width) for g in (Geometry.draw(STRONG, 112, 112, 180, (0, i, "k")) for i in range(20))} == {
        (112, 180)
    }


def test_flips_and_crops_vary_with_the_epoch():
    draws = [Geometry.draw(Perturbation(flip_p=0.5), 112, 200, 300, (0, epoch, "k")) for epoch in range(400)]
    assert 0.4 < np.mean([g.flip for g in draws]) < 0.6
    assert len({g.left for g in draws}) > 50
    assert not any(Geometry.draw(Perturbation(flip_p=0), 14, 20, 30, (0, e, "k")).flip for e in range(50))


def test_photometric_numbers_are_those_of_unimatch():
    draws = [Photometric.draw(STRONG, (0, 0, str(i))) for i in range(3000)]
    jittered = [d for d in draws if d.brightness != 1]
    assert len(jittered) / 3000 == pytest.approx(0.8, abs=0.03)
    for name, low, high in [
        ("brightness", 0.5, 1.5),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue_degrees", -90, 90),
    ]:
        values = np.array([getattr(d, name) for d in jittered])
        assert low <= values.min() < low + 0.03 * (high - low)
        assert high - 0.03 * (high - low) < values.max() <= high
    assert np.mean([d.grayscale for d in draws]) == pytest.approx(0.2, abs=0.03)
    sigmas = [d.blur_sigma for d in draws if d.blur_sigma]
    assert len(sigmas) / 3000 == pytest.approx(0.5, abs=0.03)
    assert 0.1 <= min(sigmas) < 0.15
    assert 1.95 < max(sigmas) <= 2.0


def test_photometric_identity_by_default():
    draw = Photometric.draw(Perturbation(), (0, 0, "k"))
    assert draw == Photometric()
    assert not draw.recolours
    assert Photometric(grayscale=True).recolours


def test_factors_do_not_go_below_zero():
    strong = Perturbation(jitter_p=1, brightness=1.5)
    assert min(Photometric.draw(strong, (0, 0, str(i))).brightness for i in range(500)) >= 0


def test_cutmix_boxes_follow_the_published_rule():
    boxes = [cutmix_box(STRONG, 518, (0, 0, str(i))) for i in range(2000)]
    drawn = [box for box in boxes if box is not None]
    assert len(drawn) / 2000 == pytest.approx(0.5, abs=0.04)
    for box in drawn:
        height, width = box.bottom - box.top, box.right - box.left
        assert 0 <= box.top < box.bottom <= 518
        assert 0 <= box.left < box.right <= 518
        assert 0.019 < height * width / 518**2 <= 0.4
        assert 0.29 < height / width < 3.4
    assert cutmix_box(Perturbation(cutmix_p=0), 518, (0, 0, "k")) is None
    # what never fits is not mixed, rather than tried for ever
    assert cutmix_box(Perturbation(cutmix_p=1, cutmix_area=(1, 1), cutmix_aspect=(2, 2)), 56, (0, 0, "k")) is None
    assert isinstance(drawn[0], Box)


def test_cutmix_boxes_are_higher_than_wide():
    """UniMatch: h = sqrt(area * ratio), w = sqrt(area / ratio), ratio uniform in [0.3, 1 / 0.3], so 1.8 in the mean.

    What does not fit is drawn again, and narrow boxes fit less often: 1.65 is left of the 1.8.
    """
    drawn = [cutmix_box(Perturbation(cutmix_p=1), 518, (0, 0, str(i))) for i in range(1000)]
    ratios = np.array([(box.bottom - box.top) / (box.right - box.left) for box in drawn if box is not None])
    assert len(ratios) == 1000
    assert ratios.mean() == pytest.approx(1.65, abs=0.1)
    assert (ratios > 1).mean() > 0.7
    tall = cutmix_box(Perturbation(cutmix_p=1, cutmix_area=(0.1, 0.1), cutmix_aspect=(2.5, 2.5)), 100, (0, 0, "k"))
    assert tall is not None
    assert (tall.bottom - tall.top, tall.right - tall.left) == (50, 20)


def test_partners_are_never_the_sample_itself():
    for share in (2, 3, 7):
        partners = [cutmix_partner(own, share, 0, 0, i) for own in range(share) for i in range(200)]
        owners = [own for own in range(share) for _ in range(200)]
        assert all(partner != own for partner, own in zip(partners, owners, strict=True))
        assert set(partners) == set(range(share))
    with pytest.raises(ValueError, match="no partner"):
        cutmix_partner(0, 1, 0)
