package qemu

import (
	"os"

	"github.com/lmctl/lmctl/internal/hypervisor/storage"
)

// pageSize of this host in bytes.
var pageSize = os.Getpagesize()

// gatherFiles looks at every file of a guest, in a fixed order.
func gatherFiles(def *Definition) []storage.Seen {
	var seen []storage.Seen
	for _, path := range []string{def.Firmware, def.Kernel, def.Initrd} {
		if path != "" {
			seen = append(seen, storage.Content(path))
		}
	}
	for i := range def.Disks {
		seen = append(seen, storage.Disk(def.Disks[i].Path, def.Disks[i].Format)...)
	}
	return seen
}
