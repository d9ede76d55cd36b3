from __future__ import annotations

import numpy as np
import pytest
import torch

from raypipe.errors import BatchError
from raypipe.model.batch_dims import leaf_dims

IDS = torch.zeros(4, 16, dtype=torch.long)


def dims(batch, batch_dims=None):
    leaves, found = leaf_dims(batch, batch_dims)
    return dict(zip((leaf.path for leaf in leaves), found, strict=True))


def test_dimension_0_where_it_has_the_batchs_size():
    batch = {"ids": IDS, "labels": IDS[:, 0], "mask": None, "scale": torch.tensor(2.0), "flag": True, "name": "x"}
    assert dims(batch) == {"ids": 0, "labels": 0, "mask": None, "scale": None, "flag": None, "name": None}
    assert dims((torch.ones(4, 3), np.ones((4, 2)))) == {"[0]": 0, "[1]": 0}
    assert dims(torch.ones(4, 3)) == {"the batch": 0}


def test_a_tensor_without_the_batchs_size_is_shared():
    batch = {"ids": IDS, "labels": IDS, "bias": torch.ones(1, 1, 16, 16)}
    assert dims(batch)["bias"] is None


def test_a_list_of_strings_is_cut_where_it_has_one_for_each_sample():
    batch = {"ids": IDS, "labels": IDS, "texts": list("abcd"), "names": ["one", "two"], "size": (224, 224)}
    assert dims(batch) == {"ids": 0, "labels": 0, "texts": 0, "names": None, "size": None}


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"ids": IDS, "labels": IDS, "position_ids": torch.zeros(3, 4, 16)}, r"position_ids, of shape \[3, 4, 16\]"),
        ({"ids": IDS[:3], "labels": IDS[:3], "position_ids": torch.zeros(3, 3, 16)}, "dimension 1 has that size too"),
        ({"ids": IDS, "labels": IDS[:, 0], "mask": torch.zeros(4, 4)}, r"batch_dims=\{'mask': 1\}"),
        (({"ids": IDS, "rope": torch.zeros(2, 4)}, IDS), r"batch_dims=\{0: \{'rope': 1\}\}"),
        ({"ids": IDS, "labels": IDS, "counts": [1, 2, 3, 4]}, "counts"),
        ({"ids": IDS, "position_ids": torch.zeros(3, 4, 16)}, "ids 4, position_ids 3"),
        ({"ids": IDS, "labels": IDS, "graph": object()}, "graph is a object"),
        ({"flag": True}, "no tensor"),
        ({"ids": IDS[:0]}, "no samples"),
    ],
)
def test_what_is_uncertain_is_asked_for(batch, words):
    with pytest.raises(BatchError, match=words) as error:
        leaf_dims(batch)
    assert "\n" not in str(error.value)


def test_batch_dims_by_name_by_index_and_as_a_tree():
    batch = {"ids": IDS[:3], "position_ids": torch.zeros(3, 3, 16), "graph": object()}
    assert dims(batch, {"position_ids": 1, "graph": None}) == {"ids": 0, "position_ids": 1, "graph": None}
    assert dims(batch, {"position_ids": -2, "graph": None})["position_ids"] == 1
    nested = ({"x": torch.zeros(5, 4), "rope": torch.zeros(2, 4)}, torch.zeros(4))
    assert dims(nested, {0: {"x": 1, "rope": 1}}) == {"[0]['x']": 1, "[0]['rope']": 1, "[1]": 0}
    assert dims(nested, ({"x": 1, "rope": None}, {})) == {"[0]['x']": 1, "[0]['rope']": None, "[1]": 0}
    assert dims(nested, (1, 0)) == {"[0]['x']": 1, "[0]['rope']": 1, "[1]": 0}
    assert dims(torch.zeros(5, 4), 1) == {"the batch": 1}


@pytest.mark.parametrize(
    ("batch_dims", "words"),
    [
        ({"position_id": 1}, "names 'position_id', which is not in the batch"),
        ({"ids": 2}, "says 2 of ids"),
        ({"ids": "0"}, "says '0' of ids"),
        ({"ids": True}, "says True of ids"),
        ({"flag": 0}, "flag, which has none"),
        ({"ids": 0, "labels": 1}, "different numbers of samples: ids 4, labels 16"),
        ((0, 1), "batch_dims has a tuple"),
    ],
)
def test_batch_dims_that_do_not_fit(batch_dims, words):
    with pytest.raises(BatchError, match=words):
        leaf_dims({"ids": IDS, "labels": IDS, "flag": True}, batch_dims)
