# SPDX-License-Identifier: Apache-2.0
"""The rows: which models are known, and how their routers choose. All else about them is found."""

from __future__ import annotations

from dataclasses import replace

from .rules import Form, Mixer, Softmax
from .spec import MoESpec

# softmax over all experts, the K best; or the K best logits and the softmax of these, which is the same
ALWAYS = Softmax()
BY_KEY = Softmax("norm_topk_prob")
IN_FLOAT32 = Softmax(cast_weights=False)
NEVER = Softmax(False)

# sigmoid scores, a bias for choosing, weights over their sum
DEEPSEEK = Form(
    "sigmoid",
    renormalise="norm_topk_prob",
    epsilon=1e-20,
    scale="routed_scaling_factor",
    groups=True,
    bias="e_score_correction_bias",
)
BIASED = Form("sigmoid", bias="e_score_correction_bias")

ROWS = (
    # ------------------------------------------------------------------------------------------- softmax
    MoESpec("mixtral", IN_FLOAT32),
    MoESpec("minimax", IN_FLOAT32),
    MoESpec("qwen2_moe", BY_KEY),
    MoESpec("qwen3_moe", BY_KEY),
    MoESpec("qwen3_next", BY_KEY),
    MoESpec("qwen3_vl_moe_text", ALWAYS),
    MoESpec("qwen3_omni_moe_text", BY_KEY, notes="the thinker; the talker's experts stay"),
    MoESpec("qwen3_5_moe_text", ALWAYS),
    MoESpec("qwen4_exp_text", BY_KEY),
    MoESpec("olmoe", BY_KEY),
    MoESpec("flex_olmo", BY_KEY),
    MoESpec("mellum", BY_KEY),
    MoESpec("lara_mini", Softmax("norm_topk_prob", cast_weights=False)),
    MoESpec("hunyuan_v1_moe", ALWAYS),
    MoESpec("gpt_oss", ALWAYS),
    MoESpec("granitemoe", ALWAYS),
    MoESpec("granitemoe_swa", ALWAYS),
    MoESpec("granitemoeshared", ALWAYS),
    MoESpec("granitemoehybrid", ALWAYS),
    MoESpec("aria_text", ALWAYS, count_key="moe_num_experts", top_k_key="moe_topk"),
    MoESpec("jamba", NEVER),
    MoESpec(
        "deepseek_v2",
        Form(
            renormalise=False,
            scale="routed_scaling_factor",
            groups=True,
            group_score="max",
            limited=("topk_method", "group_limited_greedy"),
        ),
        also=("deepseek_ocr2_text",),
    ),
    MoESpec(
        "mistral4",
        Form(renormalise="norm_topk_prob", epsilon=1e-20, scale="routed_scaling_factor", groups=True, exact=False),
    ),
    MoESpec("mistral_large4_text", Form(epsilon=1e-20, scale="routed_scaling_factor", groups=True)),
    MoESpec("ernie4_5_moe", Form(floor="moe_norm_min", bias="e_score_correction_bias")),
    MoESpec("gemma4_text", Form(expert_scale="per_expert_scale"), unequal=False),
    # ------------------------------------------------------------------------------------------- sigmoid
    MoESpec("deepseek_v3", DEEPSEEK, also=("kimi_k2", "sarvam_mla")),
    MoESpec("deepseek_v32", DEEPSEEK),
    MoESpec("glm4_moe", DEEPSEEK, also=("sarvam_moe",)),
    MoESpec("glm4_moe_lite", DEEPSEEK),
    MoESpec("glm4v_moe_text", DEEPSEEK),
    MoESpec("glm_moe_dsa", DEEPSEEK),
    MoESpec("glm5_next_text", DEEPSEEK),
    MoESpec("dots1", DEEPSEEK),
    MoESpec("dots3_note_text", DEEPSEEK, unequal=False),
    MoESpec("nemotron_h", DEEPSEEK),
    MoESpec("mimo_v2_flash", DEEPSEEK),
    MoESpec("bailing_hybrid", DEEPSEEK),
    MoESpec("kimi_linear", DEEPSEEK),
    MoESpec("solar_open", DEEPSEEK),
    MoESpec("exaone_moe", DEEPSEEK),
    MoESpec("hy_v4", DEEPSEEK, also=("hy_v4_vl_text",)),
    MoESpec("axk1", DEEPSEEK),
    MoESpec("axk2", replace(DEEPSEEK, others_are_zero=True)),
    MoESpec(
        "beam",
        Form("sigmoid", renormalise="norm_topk_prob", epsilon=1e-20, groups=True, bias="e_score_correction_bias"),
    ),
    MoESpec("minimax_m2", BIASED),
    MoESpec("minimax_m3_vl_text", BIASED),
    MoESpec("step3p7_text", BIASED, also=("step3p5",)),
    MoESpec(
        "laguna",
        Form("sigmoid", softcap="moe_router_logit_softcapping", bias="e_score_correction_bias"),
    ),
    MoESpec(
        "hy_v3",
        Form("sigmoid", epsilon=1e-20, scale="router_scaling_factor", bias="e_score_correction_bias"),
    ),
    MoESpec("afmoe", Form("sigmoid", epsilon=1e-20, scale="route_scale", bias="expert_bias")),
    MoESpec(
        "lfm2_moe",
        Form(
            "sigmoid",
            renormalise="norm_topk_prob",
            epsilon=1e-6,
            scale="routed_scaling_factor",
            exact=False,
            bias="expert_bias",
            bias_if="use_expert_bias",
        ),
    ),
    MoESpec(
        "muse_spark_text",
        Form(
            "sigmoid",
            epsilon=1e-15,
            scale="routed_scaling_factor",
            multiplier="output_multiplier",
            bias="e_score_correction_bias",
        ),
    ),
    MoESpec("flint", Form("sigmoid", renormalise="norm_topk_prob")),
    MoESpec("kolibri1", Form("sigmoid", by_logits=True, renormalise="norm_topk_prob", bias="e_score_correction_bias")),
    MoESpec("llama4_text", Form("sigmoid", by_logits=True, on_input=True)),
    MoESpec(
        "inkling_text",
        Form(
            "sigmoid",
            scale="route_scale",
            expert_scale="global_scale",
            bias="e_score_correction_bias",
            fixed="n_shared_experts",
            shared=True,
        ),
        notes="what shared experts give changes with the choice: no methods that replay it",
    ),
    # ------------------------------------------------------------------------------------------- of their own
    MoESpec(
        "longcat_flash",
        Form(
            renormalise=False, scale="routed_scaling_factor", bias="e_score_correction_bias", fixed="zero_expert_num"
        ),
        at_least=2,
        notes="experts that do nothing always stay",
    ),
    MoESpec("phimoe", Mixer("router_jitter_noise")),
    # ------------------------------------------------------------------------------------------- by a key
    MoESpec("cohere2_moe", Form("expert_selection_fn", by_logits=True, renormalise="norm_topk_prob", exact=False)),
    MoESpec(
        "deepseek_v4",
        Form(
            "scoring_func",
            epsilon=1e-20,
            scale="routed_scaling_factor",
            exact=False,
            bias="e_score_correction_bias",
            table="tid2eid",
        ),
    ),
    MoESpec(
        "inkling2_text",
        Form("scoring_func", epsilon=1e-20, scale="routed_scaling_factor", bias="e_score_correction_bias"),
        also=("inkling2_loop_text",),
        streams=False,
    ),
    # ------------------------------------------------------------------------------------------- refused
    MoESpec("zaya", refused="its routers carry a state from layer to layer, which one layer's logits do not tell"),
    MoESpec("dbrx", refused="its experts are rows of one matrix, cut into slices inside the block"),
    MoESpec("jetmoe", refused="its attention is a second mixture of experts, counted by the same key"),
    MoESpec("doge", refused="its experts are the crossings of a grid of keys; without one the grid breaks"),
    MoESpec("switch_transformers", refused="it is an encoder and a decoder, and routing of a token depends on others"),
    MoESpec("nllb_moe", refused="it is an encoder and a decoder, and routing of a token depends on others"),
    MoESpec("vitpose_backbone", refused="it sees, and the data set that is named chooses the expert"),
    MoESpec("ernie4_5_vl_moe_text", refused="its blocks hold two sets of experts of different widths"),
    MoESpec("diffusion_gemma_text", refused="it denoises whole texts; a token's routing changes from step to step"),
    MoESpec("openai_privacy_filter", refused="it labels tokens and is no causal language model"),
)
