"""Eight fake devices for the whole suite, set before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    # Without these emitters, compiling takes half the time.
    + " --xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
)
