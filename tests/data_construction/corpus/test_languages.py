from __future__ import annotations

import subprocess
import sys

import pytest

from data_construction.corpus.languages import other_language

QUESTION = "What is the sum of the years?"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("de", "Die Seite nennt nur das Jahr und die Stadt."),
        ("fr", "Cette page ne parle que de l'histoire de l'entreprise."),
        ("es", "La tabla muestra las ventas por región en 2015 y 2016."),
        ("pt", "A página mostra uma tabela com as receitas de 2015."),
        ("it", "Questa pagina parla solo della storia dell'azienda."),
        ("nl", "Deze pagina gaat alleen over de geschiedenis van het bedrijf."),
        ("tr", "Bu sayfa 2015 yılının gelirlerini gösteren bir tablo içeriyor."),
        ("ru", "На этой странице говорится только об истории компании."),
        ("ar", "تعرض الصفحة جدول الإيرادات"),
        ("zh", "这一页没有提到收入，因此没有帮助。"),
        ("ja", "このページは収入のグラフです。"),
        ("ko", "이 페이지는 수입 그래프를 보여줍니다"),
    ],
)
def test_text_in_another_language_is_detected(language: str, text: str):
    assert other_language(text, QUESTION) == f"language {language}, the question's is en"


@pytest.mark.parametrize(
    "text",
    [
        "a red bar chart about water use, ",
        "a blue pie chart, ",
        "Text.",
        "2015: 17 %",
        "",
        "EBITDA for FY2021 is 9,390.",
    ],
)
def test_short_english_texts_raise_no_false_alarm(text: str):
    assert other_language(text, QUESTION) is None


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Die Seite nennt nur das Jahr und die Stadt.", "Wie hoch war der Umsatz im Jahr 2015?"),
        ("该页显示了收入图表", "2015年的收入是多少？"),
        ("На странице диаграмма.", "Какой была выручка в 2015 году?"),
        ("Die Seite nennt nur das Jahr und die Stadt.", "Revenue 2015?"),  # the question is too short to be sure
    ],
)
def test_same_or_uncertain_language_is_accepted(text: str, question: str):
    assert other_language(text, question) is None


def test_model_is_loaded_only_when_needed():
    code = (
        "import sys, data_construction.corpus.languages as languages\n"
        "print(languages._identifier.cache_info().currsize, 'torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["0", "False"]
