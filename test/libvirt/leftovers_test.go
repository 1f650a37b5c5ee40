package libvirt

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/lmctl/lmctl/dirtymap"
	"github.com/lmctl/lmctl/internal/lab"
	"github.com/lmctl/lmctl/internal/lab/domain"
)

// nothingLeft checks both hosts for what a migration may leave behind: on the
// host of the guest there is the guest and nothing more, on the other nothing.
// An empty host means that the guest runs nowhere.
func (c *cluster) nothingLeft(g lab.Guest, host string) {
	c.t.Helper()
	for _, h := range c.lab.Hosts() {
		c.eventually("nothing of a migration is left on "+h, func() error { return c.tidy(g, h, h == host) })
	}
	running := 0
	if host != "" {
		running = 1
	}
	if pids := c.processes(g); len(pids) != running {
		c.t.Errorf("processes %v of guest %s, want %d", pids, g.Name, running)
	}
}

func (c *cluster) tidy(g lab.Guest, host string, runs bool) error {
	if err := c.noFiles(g, host); err != nil {
		return err
	}
	active, err := c.lab.Output(c.context(), host, "virsh", "list", "--name")
	if err != nil {
		return err
	}
	if has := slices.Contains(strings.Fields(string(active)), g.Name); has != runs {
		return fmt.Errorf("its libvirt runs %q", strings.Fields(string(active)))
	}
	want := 0
	if runs && g.Shape.Backing != domain.Private { // memfd has a folder too
		want = 1
	}
	memory, err := filepath.Glob(filepath.Join(c.lab.MemoryDir(host), "libvirt", "qemu", "*-"+g.Name))
	if err != nil || len(memory) != want {
		return fmt.Errorf("memory %q, want %d (%v)", memory, want, err)
	}
	if !runs {
		return nil
	}
	pid, err := c.pid(g, host)
	if err != nil {
		return err
	}
	if fds, err := dirtymap.Leftovers(pid); err != nil || len(fds) > 0 {
		return fmt.Errorf("tracker descriptors %v in process %d (%v)", fds, pid, err)
	}
	on, err := c.capabilities(g, host)
	if err == nil && strings.Contains(on, "x-ignore-shared") {
		err = fmt.Errorf("migration capabilities %s", on)
	}
	return err
}

// noFiles checks that the agent of a host keeps nothing of a guest's migrations.
func (c *cluster) noFiles(g lab.Guest, host string) error {
	path := filepath.Join(c.lab.Outside(host, "/run/lmctl"), "libvirt", g.UUID)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s is there (%v)", path, err)
	}
	return nil
}

// pid is that of a guest's QEMU on a host.
func (c *cluster) pid(g lab.Guest, host string) (int, error) {
	text, err := os.ReadFile(c.lab.Outside(host, "/run/libvirt/qemu/"+g.Name+".pid"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// processes are all QEMUs of a guest.
func (c *cluster) processes(g lab.Guest) []int {
	c.t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		c.t.Fatal(err)
	}
	var pids []int
	for _, path := range lines {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended meanwhile
		}
		if bytes.Contains(b, []byte("-uuid\x00"+g.UUID+"\x00")) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				c.t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

// capabilities are the migration capabilities of a guest's QEMU that are on.
func (c *cluster) capabilities(g lab.Guest, host string) (string, error) {
	out, err := c.lab.Output(c.context(), host, "virsh", "qemu-monitor-command", g.Name, "--hmp", "info migrate_capabilities")
	if err != nil {
		return "", err
	}
	var on []string
	for line := range strings.Lines(string(out)) {
		if name, state, ok := strings.Cut(strings.TrimSpace(line), ": "); ok && state == "on" {
			on = append(on, name)
		}
	}
	return strings.Join(on, " "), nil
}

// parameters are the migration parameters of a guest's QEMU.
func (c *cluster) parameters(g lab.Guest, host string) string {
	c.t.Helper()
	return c.virsh(host, "qemu-monitor-command", g.Name, "--hmp", "info migrate_parameters")
}

// diskOwner says whether the disk of a guest that runs is still QEMU's to open.
func (c *cluster) diskOwner(g lab.Guest) error {
	paths, err := filepath.Glob(filepath.Join(c.lab.Storage(), g.Name+".*"))
	if err != nil || len(paths) != 1 {
		return fmt.Errorf("disks %q (%v)", paths, err)
	}
	info, err := os.Stat(paths[0])
	if err != nil {
		return err
	}
	u, err := user.Lookup(qemuUser)
	if err != nil {
		return err
	}
	if st := info.Sys().(*syscall.Stat_t); strconv.Itoa(int(st.Uid)) != u.Uid {
		return fmt.Errorf("%s belongs to user %d, and QEMU is %s", paths[0], st.Uid, u.Uid)
	}
	return nil
}
