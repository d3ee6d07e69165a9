import pytest
from small_llama import make_llama


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def llama(request):
    return make_llama(tie_word_embeddings=request.param)
