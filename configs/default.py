"""Every field of the configuration, with its meaning, its unit and why it is what it is.

The other files of this folder start from here and change what they need. On the command line
`--config.dit.steps=1000` overrides a field; a field that does not exist stops the run.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    c = ConfigDict()

    # Seed of everything random: initial weights, order of the data, noise, moving shapes.
    c.seed = 0
    # Run in this order; each is skipped when done and goes on when it was interrupted.
    c.stages = ("vqvae", "preprocess", "dit", "report")
    # (first, last): steps of each training whose trace is written to its folder, dit/profile or
    # vqvae/profile; (): none.
    c.profile = ()

    # Where things are. Empty: where the stage before writes them in the workdir.
    c.data = ConfigDict()
    # Captions: JSON, JSONL, a table (CSV, Parquet), or a folder of videos with a .txt beside each, or
    # of WebDataset archives; empty: the moving shapes'.
    c.data.captions = ""
    c.data.file_column = "file"  # of a table
    c.data.caption_column = "captions"  # of a table
    c.data.videos = ""  # folder of video files; empty: the moving shapes'
    c.data.held_out_videos = ""  # folder to watch the VQ-VAE on; empty: the moving shapes'
    c.data.images = ""  # folder of images for the VQ-VAE beside the videos; empty: none
    c.data.workers = 0  # threads that decode the VQ-VAE's clips; 0: one a core
    # Arrow dataset to train the DiT on, or several of other sizes, with a comma between two; empty:
    # WORKDIR/dataset.
    c.data.dataset = ""
    # Rows of the dataset are read where they are, in an object store or a mounted bucket, when they
    # are needed, instead of copying it to each machine first: for what is larger than a disk.
    c.data.stream = False
    c.data.cache_gb = 50.0  # of rows that were read so, kept on each machine; 0: none
    c.data.cache_dir = ""  # where; empty: ~/.cache/opensora_jax/rows
    c.data.vqvae = ""  # VQ-VAE folder or VideoGPT checkpoint; empty: WORKDIR/vqvae
    c.data.text_model = ""  # CLIP folder or hub name; empty: a small random one, made on the spot

    # Sizes of the device mesh; -1 is what the others leave. A batch is sharded over data x fsdp,
    # parameters over fsdp and tensor, sequences (the VQ-VAE: batches) over context.
    c.mesh = ConfigDict()
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.context = 1
    c.mesh.tensor = 1
    # What the DiT's gradients are summed in over tokens and devices: float32, or with auto dit.dtype,
    # which halves what is sent and is as good.
    c.mesh.reduce_dtype = "auto"

    # The generated dataset of moving shapes.
    c.shapes = ConfigDict()
    # single: one shape that moves; or scenes: sizes, speeds, two shapes and where one is of the other,
    # how many, changes of color, ways back from the border (docs/world.md).
    c.shapes.world = "single"
    c.shapes.n_videos = 3000  # for training, seen combinations only
    c.shapes.n_held_out = 240  # for evaluation, all combinations
    c.shapes.n_frames = 8  # frames a video; of scenes at least 16
    c.shapes.resolution = 32  # pixels, height and width; of scenes at least 48
    # Instead of these two, frames x height x width of several: "16x64x64,24x48x72"; of each video one
    # is drawn. Empty: none. Of scenes, which are not cut, `preprocess.buckets` are to be the same.
    c.shapes.sizes = ""
    c.shapes.fps = 8.0  # frames a second
    c.shapes.n_captions = 3  # captions a video, drawn from the phrasings

    # The tokenizer and its training. The sizes are VideoGPT's published ones.
    c.vqvae = ConfigDict()
    # videogpt, convolutions in all directions, or cosmos: causal, so that n_frames is 1 and a
    # multiple of downsample[0].
    c.vqvae.architecture = "videogpt"
    c.vqvae.quantizer = "vq"  # a learned codebook, or fsq: a fixed grid of `levels`; cosmos has fsq
    c.vqvae.levels = (8, 8, 8, 5, 5, 5)  # of fsq, a dimension each; 64,000 codes, as Cosmos-DV's
    c.vqvae.multipliers = (2, 4, 4)  # of cosmos: the widths of its levels over n_hiddens
    c.vqvae.patch = 4  # of cosmos: pixels and frames that wavelets fold into channels
    c.vqvae.distance = "l2"  # of reconstructions: l2, squared, or l1
    # What is added to it: LPIPS, with the weights of a file or folder (VGG16 as torchvision saves it,
    # beside it LPIPS's own where there are), of one frame of each clip; empty: nothing.
    c.vqvae.perceptual = ""
    c.vqvae.perceptual_weight = 1.0
    # And an adversary's opinion of the reconstructions, with this weight; 0: there is none.
    c.vqvae.adversarial = 0.0
    c.vqvae.adversarial_from = 0.5  # share of the training from which on it counts, and is trained
    c.vqvae.adversarial_width = 64  # of its networks
    c.vqvae.init_from = ""  # a tokenizer of the same sizes that the training begins with
    c.vqvae.train = "all"  # or decoder: codes stay as they are, as for larger frames of known codes
    c.vqvae.n_codes = 2048  # codebook size, of vq
    c.vqvae.embedding_dim = 256  # dimension of a code, of vq
    c.vqvae.n_hiddens = 240  # width of the networks
    c.vqvae.n_res_layers = 4  # residual blocks in the encoder and in the decoder
    c.vqvae.downsample = (4, 4, 4)  # time, height, width; powers of two
    c.vqvae.normalize_latents = True  # unit RMS before quantization: keeps the codebook alive
    c.vqvae.n_frames = 16  # frames a training clip
    c.vqvae.resolution = 128  # pixels, short side of a clip, cropped square
    c.vqvae.fps = 8.0  # frames a second of a clip; 0: as in the file
    c.vqvae.still_share = 0.2  # of clips that are images of data.images, if there are any
    c.vqvae.batch_size = 32  # clips a step, over all devices
    c.vqvae.accumulate = 1  # microbatches a step, when a batch does not fit
    c.vqvae.steps = 100_000
    c.vqvae.learning_rate = 3e-4  # peak, after warm-up
    c.vqvae.warmup_steps = 500
    c.vqvae.b1 = 0.9  # Adam's
    c.vqvae.b2 = 0.99  # Adam's; short, because the codebook moves
    c.vqvae.weight_decay = 0.0
    c.vqvae.clip_norm = 1.0  # global gradient norm
    c.vqvae.ema_decay = 0.999  # of the weights that are used afterwards
    # Shares of the training between which positions go over from continuous to quantized: an
    # autoencoder that already works gives the codebook something worth quantizing.
    c.vqvae.quantize_from = 0.1
    c.vqvae.quantize_to = 0.2
    # Of a clip's first and last frame in the loss: they see frames on one side only, and where
    # windows of long videos meet, less sharp ones would show (docs/performance.md).
    c.vqvae.end_weight = 4.0
    c.vqvae.dtype = "auto"  # compute: float32, bfloat16, or auto (bfloat16 where the device has it)
    c.vqvae.log_every = 50  # steps
    c.vqvae.eval_every = 2000  # steps
    c.vqvae.checkpoint_every = 1000  # steps
    c.vqvae.keep_checkpoints = 2  # the last ones
    c.vqvae.keep_every = 0  # steps between checkpoints that are kept for good; 0: none
    c.vqvae.max_skipped_steps = 10  # in a row: so many that are not finite stop the training

    # Videos and captions -> the Arrow dataset.
    c.preprocess = ConfigDict()
    # Pixels, short side, cropped square; of several, (32, 64), a dataset each: WORKDIR/dataset32, ...
    c.preprocess.resolution = FieldReference(128, field_type=object)
    # Instead of one resolution, frames x height x width of several: "16x96x160,1x128x128", each a
    # dataset in WORKDIR/dataset/16x96x160, or "auto": by the videos. A video goes to the one that
    # loses least of it, images to those of one frame; the DiT learns from all. Empty: none. Not with
    # `split_scenes`.
    c.preprocess.buckets = ""
    # Of "auto": tokens of a clip at most, each a latent frame x dit.patch x dit.patch; `n_frames`
    # are then frames of a clip at most.
    c.preprocess.bucket_tokens = 1280
    # Frames a second; 0: as in the file. Of 16 frames at 8 a second one sees 2 seconds of what the
    # caption says, at a film's own rate half a second.
    c.preprocess.fps = 8.0
    c.preprocess.max_frames = 0  # longer videos (then) are left out, and counted; 0: none
    c.preprocess.n_frames = 0  # keep only this many frames of a video; 0: all
    # Cut videos into clips of this many frames, each with rows of its own; 0: a video is one clip.
    c.preprocess.clip_frames = 0
    c.preprocess.clip_stride = 0  # frames from one clip's begin to the next one's; 0: clip_frames
    c.preprocess.window = 0  # frames encoded together; 0: the length the VQ-VAE was trained on
    # Pixels of the overlapping tiles that frames too large for a device are encoded, and samples
    # decoded in; 0: whole.
    c.preprocess.tile = 0
    c.preprocess.batch_size = 8  # windows encoded at once
    c.preprocess.videos_per_part = 500  # a kill loses at most one part's work
    # Each row with all its columns, for others to read part by part: codes and features are stored
    # as often as there are captions.
    c.preprocess.flat = False
    # Cut videos where another shot begins, so that no clip spans two (the extra `scenes`).
    c.preprocess.split_scenes = False
    c.preprocess.crop_bars = False  # cut black bars off before videos are resized
    # What a clip has to show at least, else it is filtered; 0: anything.
    c.preprocess.min_side = 0  # pixels of the file's shorter side, without bars that are cut off
    c.preprocess.min_motion = 0.0  # by which pixels differ from frame to frame, of 255
    c.preprocess.min_brightness = 0.0  # of pixels in the brightest frame, of 255
    c.preprocess.max_frozen = 0.0  # share of frames in a run of equal ones, at most; 0: any
    # Of 256 bits of what a clip looks like, in how many it may differ from one of another video
    # before it, and be filtered for that; 0: duplicates stay.
    c.preprocess.near_duplicates = 0
    # Seconds after which a video counts as failed, and its decoder, which may hang, is ended; 0: none.
    # A film of two hours in 4K takes two and a half hours on one core; of short clips 60 is plenty.
    c.preprocess.video_timeout = 21_600.0
    c.preprocess.strict = False  # one video that cannot be used ends it, instead of being left out

    # The DiT and its training.
    c.dit = ConfigDict()
    # S, B, L or XL, with heads of 128 unless it starts from a checkpoint; empty: these numbers.
    c.dit.size = "B"
    c.dit.depth = 0
    c.dit.width = 0
    c.dit.heads = 0
    # A checkpoint of facebookresearch/DiT of the same depth, width and heads, such as
    # DiT-XL-2-256x256.pt: a new training starts from its blocks. Empty: from scratch.
    c.dit.init_from = ""
    # Principal components of the code embeddings that are denoised. auto: those with 99% of their
    # variance; 0: all channels as they are.
    c.dit.components = FieldReference("auto", field_type=object)
    c.dit.patch = 2  # a token is 1 x patch x patch latents
    c.dit.text_mode = "cross_attention"  # or in_context: text tokens join the sequence
    # What the model is told: text, or frames, which are text and latent frames that are known: then
    # it also animates images, goes on with videos and fills gaps (docs/frames.md).
    c.dit.conditioning = "text"
    c.dit.text_length = 0  # tokens a caption is padded or cut to; 0: the longest in the data
    # Latent frames an example, or several lengths, (4, 8), where a bucket has so many; 0: as many as
    # 90% of the data have, in whole windows, or a bucket has. Trained on several sizes, a model draws
    # any between; a batch is of one of them.
    c.dit.n_latent_frames = FieldReference(0, field_type=object)
    c.dit.caption_dropout = 0.1  # share of examples without text, for guidance
    # What is trained on: of embeddings flow, rectified flow, or ddpm, DiT's (the noise, its variance
    # learned); of codes masked, MaskGIT's, or metric, a path of ever nearer codes
    # (docs/objectives.md).
    c.dit.objective = "flow"
    # What the network gives: of flow velocity, of ddpm noise, or of either data (the clean latents,
    # from which the others follow). auto: data of ddpm, and of flow where a token holds as many
    # numbers as the network is wide. Of no account to masked and metric.
    c.dit.prediction = "auto"
    # Above 1: more of the noisy times, or, of ddpm, more noise. auto: of flow by how much noise it
    # takes to hide a token.
    c.dit.time_shift = FieldReference("auto", field_type=object)
    # Of masked and metric: joint, logits of all codes; factorized, of the values of each dimension of
    # an FSQ tokenizer's codes; auto: factorized where the codes are FSQ's.
    c.dit.code_head = "auto"
    # Of metric: codes at a noise level t are drawn by softmax(-scale ((1 - t) / t)^power distance);
    # URSA's are 3 and 0.9 (docs/objectives.md, Levels).
    c.dit.beta_scale = 1.0
    c.dit.beta_power = 1.5
    c.dit.validation_share = 0.02  # share of the videos held back to measure the loss on
    # Examples a step, over all devices; of several sizes those of the largest, and as many tokens of
    # the others.
    c.dit.batch_size = 256
    c.dit.accumulate = 1  # microbatches a step, when a batch does not fit
    c.dit.steps = 100_000
    c.dit.optimizer = "adamw"  # or muon: fewer steps, each dearer
    c.dit.learning_rate = 1e-4  # peak, after warm-up
    c.dit.warmup_steps = 1000
    c.dit.b1 = 0.9  # Adam's
    c.dit.b2 = 0.99  # Adam's
    c.dit.weight_decay = 0.0  # the paper's
    c.dit.clip_norm = 1.0  # global gradient norm
    c.dit.ema_decay = 0.9999  # the paper's
    c.dit.attention = "auto"  # cudnn (GPU), splash (TPU), xla, or auto: the fastest there is
    c.dit.remat = "full"  # none, dots, offload or full: the less is saved, the longer ones fit
    c.dit.unroll = 1  # blocks compiled as one piece: more run faster on CPU and compile slower
    c.dit.dtype = "auto"  # compute: float32, bfloat16, or auto (bfloat16 where the device has it)
    c.dit.log_every = 50  # steps
    c.dit.eval_every = 2000  # steps between validations and sample videos
    c.dit.checkpoint_every = 1000  # steps
    c.dit.keep_checkpoints = 2  # the last ones
    c.dit.keep_every = 0  # steps between checkpoints that are kept for good; 0: none
    c.dit.max_skipped_steps = 10  # in a row: so many that are not finite stop the training

    # What bench and plan, which see no data, cannot take from elsewhere.
    c.bench = ConfigDict()
    c.bench.text_width = 512  # width of the text features: 512 of CLIP's base models, 768 of large

    # Samples drawn during training, for the report and by opensora_jax.sample by default.
    c.sample = ConfigDict()
    c.sample.steps = 50  # of the sampler
    # With flow euler, heun (two calls of the network a step) or dpm++ (second order with one); with
    # ddpm ddim, ancestral (DiT's, which draws noise in each step) or dpm++; auto: the first. The
    # others have one each.
    c.sample.sampler = "auto"
    c.sample.eta = 0.0  # of ddim: share of the noise that each step draws anew
    c.sample.guidance = 4.0  # scale of classifier-free guidance; 1: off
    c.sample.guidance_from = 0.0  # noise levels between which there is guidance: 0 is the data,
    c.sample.guidance_to = 1.0  # 1 the noise
    c.sample.guidance_rescale = 0.0  # share to which guided outputs keep the others' deviation
    # Of masked and metric, how codes are drawn: their logits are divided by the first, and of the
    # likeliest with this share of the probability alone.
    c.sample.temperature = 1.0
    c.sample.top_p = 1.0
    c.sample.choice_temperature = 4.5  # of masked: chance in which codes are kept first
    c.sample.prompts = ()  # drawn while training; empty: captions of the validation videos

    # Grading of samples on moving shapes (needs the shapes stage).
    c.fidelity = ConfigDict()
    c.fidelity.n_samples = 240  # videos, over all combinations
    c.fidelity.batch_size = 48  # videos sampled at once
    return c
