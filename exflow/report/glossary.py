"""Words of the page with their meanings."""

MEANINGS = {
    "MoE layer": "A layer whose MLP is many experts, of which every token uses a few.",
    "expert": "One of the MLPs of a MoE layer. A gate selects top_k of them for each token.",
    "top_k": "Number of experts that a token uses in a MoE layer.",
    "sequence": "A prompt and the tokens that the model wrote to it. Its home is the GPU that admitted it: "
    "its number modulo the GPUs.",
    "phase": "Prefill: the tokens of prompts. Decode: tokens that the model wrote, one a step.",
    "affinity": "Excess over chance with which an expert of a layer and one of the next serve the same "
    "tokens.",
    "placement": "Assignment of experts to GPUs. A plan is a file that holds one.",
    "contiguous": "The baseline: the first experts of every layer on the first GPU, and so on, as engines do "
    "unless told otherwise.",
    "owner": "The GPU that holds a token's hidden state now, and runs its attention.",
    "dispatch-combine": "Two all-to-alls a layer: a token goes to its experts and always comes home, as in "
    "engines.",
    "coherent": "Every GPU keeps the context of all sequences, so a token stays where one of its experts "
    "is. With top_k 1 the second all-to-all is gone.",
    "node-coherent": "Coherent among the GPUs of a node; between nodes tokens come home.",
    "replicated": "Every GPU runs attention for every token, and an all-reduce a layer sums the outputs of "
    "experts.",
    "message": "One hidden state of one token that goes from one GPU to another, to an expert or back. "
    "Given per token and MoE layer.",
    "inside a node": "Messages between GPUs of one node, over fast links.",
    "between nodes": "Messages between GPUs of different nodes, over the network.",
    "K/V copies": "Copies of a token's new keys and values that other GPUs of its group get in the "
    "background, per token and attention layer.",
    "exchanges a step": "Synchronous collectives of a decode step. Each of them costs latency.",
    "local fraction": "Share of the transitions between a token's first choices in adjacent MoE layers "
    "that stay on a GPU.",
    "imbalance": "Load of the busiest GPU over the mean load, averaged over layers; 1 is level. A unit of "
    "load is a pair of a token and a selected expert.",
    "owners' imbalance": "Tokens of the GPU that owns most over the mean, averaged over layers; 1 is level.",
    "busiest link": "Rows into or out of the GPU with most, dispatch plus combine, for each token of a GPU "
    "and MoE layer. All GPUs wait for it.",
    "imbalance in a batch": "Load of the busiest GPU over the mean in one batch, where chance adds to the "
    "imbalance.",
    "objective": "Value that placing minimised; see docs/placement.md.",
    "gap": "Largest share of the objective that a better plan could save.",
    "interval": "Range that holds the figure of endless tokens of the same kind with a probability of about "
    "95%; by the bootstrap over sequences.",
}


def anchor(name: str) -> str:
    return "word-" + "".join(letter if letter.isalnum() else "-" for letter in name.lower())
