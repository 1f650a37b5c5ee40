package libvirt

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
)

// qemuConf is what matters of libvirt's qemu.conf, which no call tells.
type qemuConf struct {
	dynamicOwnership bool
	memoryBackingDir string
}

var confLine = regexp.MustCompile(`^\s*([a-z_]+)\s*=\s*("[^"]*"|'[^']*'|[0-9]+)\s*(#.*)?$`)

// readQEMUConf reads the file; without one, libvirt's defaults hold.
func readQEMUConf(path string) (qemuConf, error) {
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return qemuConf{}, fmt.Errorf("libvirt's configuration: %w", err)
	}
	return parseQEMUConf(string(text)), nil
}

func parseQEMUConf(text string) qemuConf {
	c := qemuConf{dynamicOwnership: true, memoryBackingDir: "/var/lib/libvirt/qemu/ram"}
	for line := range strings.Lines(text) {
		m := confLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			continue
		}
		switch value := strings.Trim(m[2], `"'`); m[1] {
		case "dynamic_ownership":
			c.dynamicOwnership = value != "0"
		case "memory_backing_dir":
			c.memoryBackingDir = value
		}
	}
	return c
}
