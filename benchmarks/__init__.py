"""Measurements of speed, memory and endurance: `make bench` and `make torture`."""

import mnist_exp as mnist_exp  # before torch, whose threads it keeps from spinning while they wait
