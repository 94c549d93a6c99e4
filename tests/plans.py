"""A small complete plan, for tests to vary."""

from train.plan import Plan

PLAN = Plan(
    arch="lenet5",
    dataset="digits",
    data_origin="scikit-learn",
    train_examples=1437,
    test_examples=360,
    num_classes=10,
    channels=1,
    image_size=32,
    recipe="small",
    batch_size=16,
    steps=4,
    learning_rate=0.1,
    schedule="cosine",
    warmup_steps=1,
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,
    decay_norm_and_bias=True,
    label_smoothing=0.0,
    dropout_rate=None,
    clip_norm=0.0,
    ema_decay=0.0,
    head_init="network",
    augmentation="pad_crop",
    flip=False,
    seed=0,
    precision="float32",
    bn="local",
)
