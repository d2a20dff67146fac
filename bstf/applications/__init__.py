"""Reference networks, and the published weights of some."""

from bstf.applications.cifar_resnet import cifar_resnet
from bstf.applications.efficientnet_lite import efficientnet_lite0
from bstf.applications.small_resnet import small_resnet

__all__ = ["cifar_resnet", "efficientnet_lite0", "small_resnet"]
