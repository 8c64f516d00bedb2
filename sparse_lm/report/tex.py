"""Escaping of text for LaTeX: every character is printed literally, and the source is ASCII."""

import functools
import re
import unicodedata

# Braces around brackets and stars, or a row that begins with one gives `\\\\` or a rule an argument.
_TEX = (
  {c: f'\\{c}' for c in '%_&#${}'}
  | {c: f'{{{c}}}' for c in '[]*'}
  | {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}'}
  | {'<': r'\textless{}', '>': r'\textgreater{}', '|': r'\textbar{}', '"': r'\texttt{"}'}
  | {'`': r'\textasciigrave{}', '°': r'\textdegree{}'}
  | {'—': r'\textemdash{}', '–': r'\textendash{}', '…': r'\ldots{}', '•': r'\textbullet{}'}
  | {'²': '$^2$', '³': '$^3$', '−': '$-$', '±': r'$\pm$', '×': r'$\times$', '·': r'$\cdot$'}
  | {'≤': r'$\le$', '≥': r'$\ge$', '≠': r'$\ne$', '≈': r'$\approx$', '→': r'$\to$'}
  | {'∞': r'$\infty$', '√': r'$\surd$', '∈': r'$\in$', '∂': r'$\partial$', 'µ': r'$\mu$'}
)
_GREEK = {
  'α': 'alpha', 'β': 'beta', 'γ': 'gamma', 'δ': 'delta', 'ε': 'epsilon', 'ζ': 'zeta', 'η': 'eta',
  'θ': 'theta', 'ι': 'iota', 'κ': 'kappa', 'λ': 'lambda', 'μ': 'mu', 'ν': 'nu', 'ξ': 'xi', 'π': 'pi',
  'ρ': 'rho', 'ς': 'varsigma', 'σ': 'sigma', 'τ': 'tau', 'υ': 'upsilon', 'φ': 'phi', 'χ': 'chi',
  'ψ': 'psi', 'ω': 'omega', 'Γ': 'Gamma', 'Δ': 'Delta', 'Θ': 'Theta', 'Λ': 'Lambda', 'Ξ': 'Xi',
  'Π': 'Pi', 'Σ': 'Sigma', 'Υ': 'Upsilon', 'Φ': 'Phi', 'Ψ': 'Psi', 'Ω': 'Omega',
}  # fmt: skip
_TEX |= {letter: f'$\\{name}$' for letter, name in _GREEK.items()}
_TEX |= {
  'ß': r'\ss{}',
  'æ': r'\ae{}',
  'Æ': r'\AE{}',
  'ø': r'\o{}',
  'Ø': r'\O{}',
  'ł': r'\l{}',
  'Ł': r'\L{}',
}
_TEX |= dict(zip('ΑΒΕΖΗΙΚΜΝΟΡΤΧο', 'ABEZHIKMNOPTXo'))  # TeX sets these as Latin letters
# Combining marks: grave, acute, circumflex, tilde, macron, breve, dot, diaeresis, ring, double acute,
# caron, cedilla.
_ACCENTS = dict(
  zip('\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327', '`\'^~=u."rHvc')
)


def escaped(value: str) -> str:
  """Returns ASCII source that LaTeX prints as the text `value`.

  A hyphen before a number becomes a minus sign at the start of the text and after a bracket. A character
  that TeX's own fonts lack is printed as its number, such as U+65E5.
  """
  shown = ''.join(map(_character, ' '.join(value.split())))
  shown = re.sub(r"([-'])(?=\1)", r'\1{}', shown)  # two would become a dash, or a closing quote
  return re.sub(r'(^|\{\[\})-(?=[\d.])', r'\1$-$', shown)


def command(value: str) -> str:
  """Returns a shell command in typewriter type; lines may break after its punctuation."""
  shown = escaped(value).replace("'", r'\textquotesingle{}')  # as a shell reads it
  breakable = re.sub(r'(?<!-)([/=,.]|\\_)', r'\1\\allowbreak{}', shown)
  return rf'\texttt{{{breakable}}}'


def _character(c: str) -> str:
  if c in _TEX:
    return _TEX[c]
  if c.isascii() and c.isprintable():
    return c
  base, *marks = unicodedata.normalize('NFD', c)
  if base.isascii() and base.isalpha() and all(mark in _ACCENTS for mark in marks):
    return functools.reduce(lambda text, mark: f'\\{_ACCENTS[mark]}{{{text}}}', marks, base)
  return rf'\texttt{{U+{ord(c):04X}}}'
