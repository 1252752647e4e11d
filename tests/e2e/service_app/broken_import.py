"""An application that cannot be imported: ``import_path: broken_import:build``."""

import no_such_module_of_heliostat  # noqa: F401
