from .files import cache_folder, images_folder, read_json, write_json
from .keys import code_of, key

__all__ = ["cache_folder", "code_of", "images_folder", "key", "read_json", "write_json"]
