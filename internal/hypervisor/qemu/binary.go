package qemu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"
)

// defaultBinary is the QEMU of a host that is not told another one.
const defaultBinary = "qemu-system-x86_64"

// probeTimeout bounds a QEMU that is only asked what it can do.
const probeTimeout = 20 * time.Second

// qemuBinary is what a QEMU can do, as it says itself.
type qemuBinary struct {
	Path     string
	Firmware string            // folder for -L, empty for its own
	Version  string            // such as 7.2.22
	Machines map[string]bool   // versioned machine types
	Aliases  map[string]string // pc, q35 and the like
}

// resolve turns a machine type into the versioned one.
func (b *qemuBinary) resolve(machine string) (string, error) {
	if full, ok := b.Aliases[machine]; ok {
		return full, nil
	}
	if b.Machines[machine] {
		return machine, nil
	}
	return "", fmt.Errorf("QEMU %s (%s) has no machine type %q; see %s -machine help", b.Version, b.Path, machine, b.Path)
}

// binaries caches what each QEMU can do for as long as its file is the same.
type binaries struct {
	path, firmware string // of guests whose definition names none

	mu    sync.Mutex
	known map[binaryKey]*qemuBinary
}

type binaryKey struct {
	path     string
	firmware string
	inode    uint64
	size     int64
	mtime    time.Time
}

// get asks the QEMU of a definition what it can do.
func (c *binaries) get(ctx context.Context, def *Definition) (*qemuBinary, error) {
	path, firmware := def.QEMU, def.FirmwareDir
	if path == "" {
		found, err := exec.LookPath(c.path)
		if err != nil {
			return nil, fmt.Errorf("find QEMU: %w; install qemu-system-x86 or set qemu in the definition", err)
		}
		path = found
		if firmware == "" {
			firmware = c.firmware
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("find QEMU: %w; install it there or set qemu in the definition", err)
	}
	key := binaryKey{path: path, firmware: firmware, size: info.Size(), mtime: info.ModTime()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		key.inode = st.Ino
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if b, ok := c.known[key]; ok {
		return b, nil
	}
	b, err := probeBinary(ctx, path, firmware)
	if err != nil {
		return nil, err
	}
	if c.known == nil {
		c.known = make(map[binaryKey]*qemuBinary)
	}
	c.known[key] = b
	return b, nil
}

var versionPattern = regexp.MustCompile(`^QEMU emulator version ([0-9]+\.[0-9]+\.[0-9]+)`)

func probeBinary(ctx context.Context, path, firmware string) (*qemuBinary, error) {
	out, err := ask(ctx, path, "--version")
	if err != nil {
		return nil, err
	}
	v := versionPattern.FindSubmatch(out)
	if v == nil {
		return nil, fmt.Errorf("%s is no QEMU system emulator: --version says %q", path, firstLine(out))
	}
	list, err := ask(ctx, path, "-machine", "help")
	if err != nil {
		return nil, err
	}
	b := &qemuBinary{Path: path, Firmware: firmware, Version: string(v[1])}
	b.Machines, b.Aliases = parseMachines(list)
	return b, nil
}

func ask(ctx context.Context, path string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	out, err := cmd.Output()
	if err != nil {
		words := ""
		var failed *exec.ExitError
		if errors.As(err, &failed) && len(failed.Stderr) > 0 {
			words = ": " + strings.TrimSpace(string(failed.Stderr))
		}
		return nil, fmt.Errorf("ask %s %s: %w%s", path, strings.Join(args, " "), err, words)
	}
	return out, nil
}

func firstLine(b []byte) []byte {
	line, _, _ := bytes.Cut(b, []byte("\n"))
	return line
}

var aliasPattern = regexp.MustCompile(`\(alias of ([A-Za-z0-9._-]+)\)`)

// parseMachines reads the list of -machine help.
func parseMachines(list []byte) (machines map[string]bool, aliases map[string]string) {
	machines, aliases = make(map[string]bool), make(map[string]string)
	lines := bufio.NewScanner(bytes.NewReader(list))
	for lines.Scan() {
		name, rest, found := strings.Cut(lines.Text(), " ")
		if !found || !machinePattern.MatchString(name) {
			continue
		}
		if alias := aliasPattern.FindStringSubmatch(rest); alias != nil {
			aliases[name] = alias[1]
		} else {
			machines[name] = true
		}
	}
	return machines, aliases
}
