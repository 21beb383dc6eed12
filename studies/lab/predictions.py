"""What the exact lab predicted, claim by claim (docs/theory.md). Written before its first full run, after a pilot of three seeds had set the
learning rate and the number of steps; what was added after a look at that pilot says so. The sampled arms had no pilot."""

from studies.claims import Prediction

KL = 0.01  # nats a token: the smallest forgetting of interest
CONTENT = 0.01  # nats a response, of what is said whatever the style
ENTROPY = 0.02  # nats a token


def _predict(claim: str, name: str, statement: str, predicted: str, sesoi: float, unit: str) -> Prediction:
    return Prediction(id=f"{claim}/lab/{name}", claim=claim, statement=statement, predicted=predicted, sesoi=sesoi, unit=unit, study="lab")


PREDICTIONS = (
    _predict("C1", "exact", "‖E g‖ of exact self-data at θ₀ is 0 beside the task's", "-", -1e-8, "of the task's ‖E g‖"),
    _predict("C1", "paper", "the paper's sampler (0.7, 0.9) exerts a force at θ₀", "+", 0.01, "of the task's ‖E g‖"),
    _predict("C1", "paper below task", "the force of the paper's sampler at θ₀ is smaller than the task's", "-", -1.0, "of the task's ‖E g‖"),
    _predict("C1", "mean loss", "a mean over each response's tokens exerts a force at θ₀", "+", 0.01, "of the task's ‖E g‖"),
    _predict("C1", "deduplicated", "removing repeated rows exerts a force at θ₀", "+", 0.01, "of the task's ‖E g‖"),
    _predict("C2", "kl", "own answers in a foreign style are forgotten over more than untouched ones", "+", KL, "nats/token"),
    _predict("C2", "content", "own answers in a foreign style change what the model says, whatever its style", "+", CONTENT, "nats/response"),
    _predict("C2", "kl, sampled", "the same from drawn rows under Adam, by the package's own trainer", "+", KL, "nats/token"),
    _predict("C3", "kl", "style-induced share of forgetting", "+", 0.5, "share"),
    _predict("C3", "content", "style-induced share of the forgetting of what answers say", "+", 0.5, "share"),
    _predict("C3", "kl, sampled", "style-induced share from drawn rows under Adam, by the package's own trainer", "+", 0.5, "share"),
    _predict("C4", "coherence", "coherence over prompts of style's gradients minus that of content's", "+", 0.1, "1"),
    _predict("C4", "shared", "cosine between topics of style's gradients minus that of content's", "+", 0.1, "1"),
    _predict("C5", "kl", "rank correlation with KL: Fisher-weighted drift minus ‖δ‖₂", "+", 0.1, "1"),
    # Added after the pilot: what is known of the data alone cannot follow a course, so that runs are also compared at their ends.
    _predict("C5", "kl, ends", "rank correlation with KL at the ends of the runs: Fisher-weighted drift minus ‖δ‖₂", "+", 0.1, "1"),
    _predict("C5", "content", "rank correlation with forgotten content: Fisher-weighted drift minus ‖δ‖₂", "+", 0.1, "1"),
    _predict("C6", "slope", "|slope of g_self on F δ − 1| at a thousandth of the task's drift", "-", -0.1, "1"),
    _predict("C6", "push", "cosine of g_self and δ at the end of training on the task", "+", 0.05, "1"),
    _predict("C6", "against the task", "cosine of g_self and g_task at the end of SA-SFT", "-", 0.05, "1"),
    _predict("C7", "selective", "share of the drift that λ = ½ removes in the span of style's gradients minus in that of content's", "+", 0.1, "share"),
    # Added after the pilot, in which half the task's dose alone explained much of what λ = ½ seemed to remove.
    _predict("C7", "selective, equal dose", "the same against the task at half rate, which is as much of the task as λ = ½ holds", "+", 0.1, "share"),
    _predict("C7", "dose, early", "|log(predicted/observed KL)| after 5 steps, mean over λ", "-", -0.25, "1"),
    _predict("C7", "dose, end", "|log(predicted/observed KL)| at the end, mean over λ", "-", -0.25, "1"),
    # Added after the pilot, in which H turned out indefinite and the prediction that uses it grew without bound.
    _predict("C7", "dose, end, Gauss-Newton", "|log(predicted/observed KL)| at the end, mean over λ, with the Gauss-Newton part of H in its place", "-", -0.25, "1"),
    _predict("C8", "kl", "mixing external data forgets more than mixing self-data", "+", KL, "nats/token"),
    _predict("C8", "content", "mixing external data changes more of what the model says than mixing self-data", "+", CONTENT, "nats/response"),
    # Added after the pilot: the other external styles are pure ones, less varied than any model's.
    _predict("C8", "kl, as varied", "the same with external data whose style is as varied as the base's", "+", KL, "nats/token"),
    _predict("C8", "order", "rank correlation of forgetting with the external data's style distance", "+", 0.5, "1"),
    _predict("C9", "kl", "share of a topic's retention (KL of whole responses) that is left without it in the self-data", "+", 0.8, "share"),
    _predict("C9", "content", "share of a topic's retention (KL of what is said) that is left without it in the self-data", "+", 0.8, "share"),
    _predict("C10", "kl", "at equal gain on the task, task-only forgets more than SA-SFT", "+", KL, "nats/token"),
    _predict("C10", "content", "at equal gain on the task, task-only changes more of what the model says than SA-SFT", "+", CONTENT, "nats/response"),
    _predict("C10", "kl, sampled", "the same from drawn rows under Adam, by the package's own trainer", "+", KL, "nats/token"),
    _predict("C11", "exact", "entropy after SA-SFT with exact self-data minus the base's", "+", -ENTROPY, "nats/token"),
    _predict("C11", "paper", "entropy after SA-SFT with the paper's sampler minus that with the exact one", "-", ENTROPY, "nats/token"),
    _predict("C11", "paper, sampled", "the same from drawn rows under Adam, by the package's own trainer", "-", ENTROPY, "nats/token"),
)
