# SPDX-License-Identifier: Apache-2.0
import functools

import torch


def as_written(function):
    """Run ``function``, whose first argument is a tensor, at the dtypes that it names, whatever torch.autocast says."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call
