"""What a user of the libraries writes to read exported folders. Nothing of this package is imported."""

import json
import sys

import open_clip
import peft
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

root, bert = sys.argv[1:]
given = load_file(f"{root}/inputs")
found, info = {}, {}
with torch.no_grad():
    for name in ("folded", "mixed", "sharded"):
        model, info[name] = transformers.AutoModel.from_pretrained(f"{root}/{name}", output_loading_info=True)
        info[name] = [sorted(names) for names in info[name].values()]
        assert model.dtype == (torch.bfloat16 if name == "sharded" else torch.float32), model.dtype
        found[name] = model.float().eval()(given["ids"]).last_hidden_state
    base = transformers.AutoModel.from_pretrained(bert)
    found["peft"] = peft.PeftModel.from_pretrained(base, f"{root}/peft").eval()(given["ids"]).last_hidden_state
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{root}/folded")
    info["tokens"] = tokenizer("a dog jumps")["input_ids"]
    found["timm"] = timm.create_model(f"local-dir:{root}/timm", pretrained=True).eval()(given["pixels"])
    model = open_clip.create_model(f"local-dir:{root}/open_clip").eval()
    found["open_clip"] = torch.cat([model.encode_image(given["small"]), model.encode_text(given["short"])])
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{root}/llama")
    info["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
    info["dtype"] = str(model.dtype)
    found["llama"] = model.float().eval()(given["ids"]).logits
info["ours"] = [name for name in sys.modules if name.startswith("fulgurite")]
save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{root}/outputs")
print(json.dumps(info))
