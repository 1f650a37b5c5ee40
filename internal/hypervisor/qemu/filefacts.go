package qemu

import (
	"errors"
	"os"

	"github.com/lmctl/lmctl/internal/hypervisor/storage"
)

// pageSize of this host in bytes.
var pageSize = os.Getpagesize()

// gatherFiles looks at every file of a guest, in a fixed order. Its error
// joins one for each file that cannot be used.
func gatherFiles(def *Definition) ([]storage.Facts, error) {
	var facts []storage.Facts
	var errs []error
	for _, path := range []string{def.Firmware, def.Kernel, def.Initrd} {
		if path == "" {
			continue
		}
		f, err := storage.OfContent(path)
		errs = append(errs, err)
		facts = append(facts, f)
	}
	for i := range def.Disks {
		f, err := storage.OfDisk(def.Disks[i].Path, def.Disks[i].Format)
		errs = append(errs, err)
		facts = append(facts, f)
	}
	return facts, errors.Join(errs...)
}
