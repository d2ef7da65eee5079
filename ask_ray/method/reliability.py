"""Adaptive reliability of pairs (method: ASK §4.3): pairs whose two neighbourhoods agree weigh more in the loss.

Entries are pairs, so the neighbourhoods that audio and text retrieved, N^a and N^t, can each be read in both
modalities: g(X, N) is the weighted mean of rows N of X.

    c_i = ½ [cos(g(û, N^a_i), g(û, N^t_i)) + cos(g(v̂, N^t_i), g(v̂, N^a_i))]
    Ψ_i = |B| softmax_i(c_i / τ_Ψ)
"""

from torch import Tensor

from ask_ray.method.tensors import check_positive, check_shape, normalise


def consistency(audio_by_audio: Tensor, audio_by_text: Tensor, text_by_text: Tensor, text_by_audio: Tensor) -> Tensor:
    """c: how well the neighbourhoods that a pair's audio and text retrieved agree (ASK §4.3).

    Args:
        audio_by_audio: ``(B, d)``, g(û, N^a): audio rows read by the audio's neighbourhood.
        audio_by_text: ``(B, d)``, g(û, N^t).
        text_by_text: ``(B, d)``, g(v̂, N^t).
        text_by_audio: ``(B, d)``, g(v̂, N^a).

    Returns:
        ``(B,)`` in [-1, 1]. A cosine with a zero read counts as 0, so a pair one of whose neighbourhoods is empty
        has consistency 0.

    Raises:
        ValueError: shapes that differ within a modality, or batches that differ.
    """
    check_shape("audio_by_text", audio_by_text, audio_by_audio.shape)
    check_shape("text_by_audio", text_by_audio, text_by_text.shape)
    check_shape("text_by_text", text_by_text, (audio_by_audio.shape[0], text_by_text.shape[-1]))
    return (_cosine(audio_by_audio, audio_by_text) + _cosine(text_by_text, text_by_audio)) / 2


def potential(consistency: Tensor, temperature: float) -> Tensor:
    """Ψ = |B| softmax(c / τ_Ψ): the reliability potential that multiplies each pair's loss (ASK §4.3).

    Args:
        consistency: ``(B,)``, of the whole batch.
        temperature: τ_Ψ > 0; the larger, the nearer Ψ is to 1 for every pair.

    Returns:
        ``(B,)``, in [0, B], mean 1, detached: the model cannot lower its loss by making pairs inconsistent.

    Raises:
        ValueError: a temperature that is not positive.
    """
    check_positive("temperature", temperature)
    return len(consistency) * (consistency.detach() / temperature).softmax(dim=0)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return (normalise(first) * normalise(second)).sum(dim=-1)
