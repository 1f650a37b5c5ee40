package lab

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/digitalocean/go-libvirt"

	"github.com/lmctl/lmctl/guest/linux"
	"github.com/lmctl/lmctl/internal/lab/domain"
	"github.com/lmctl/lmctl/internal/testenv"
)

// specOf is a guest of a shape.
func specOf(c domain.Case, number int) GuestSpec {
	s := GuestSpec{Name: fmt.Sprintf("case%d", number), Kind: Flat, Host: "host1", Memory: c.Memory, VCPUs: c.VCPUs, Shape: c.Shape, WorkingSet: 8 << 20, DirtyRate: 1 << 20}
	if c.Linux {
		s.Kind = Linux
	}
	return s
}

// started are the shapes whose guests run in the lab's own tests: each kind of
// memory, everything that a guest can have, and the other firmware.
var started = []string{"pc-two-nodes", "q35-everything", "pc-memfd", "q35-private", "pc-transient", "linux-q35-uefi"}

// libvirt takes all shapes, and guests of them come to work.
func TestShapes(t *testing.T) {
	testenv.NeedKVM(t)
	for _, path := range []string{domain.FirmwareCode, domain.FirmwareVars} {
		if _, err := os.Stat(path); err != nil {
			testenv.Missing(t, "UEFI firmware", err)
		}
	}
	init, err := linux.BuildInit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	file := t.TempDir() + "/init"
	if err := os.WriteFile(file, init, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("LMCTL_GUEST_INIT", file)
	l := upLibvirt(t, Options{Hosts: 1, NoAgents: true, MemoryLimit: 8 << 30})
	t.Run("guests", func(t *testing.T) { // ends when all of them have
		for i, c := range domain.Cases() {
			t.Run(c.Name, func(t *testing.T) {
				t.Parallel()
				spec := specOf(c, i)
				if !slices.Contains(started, c.Name) {
					defines(t, l, spec)
					return
				}
				g := start(t, l, spec)
				healthy(t, l, g, "host1")
				if err := l.RemoveGuest(t.Context(), g.Name); err != nil {
					t.Error(err)
				}
			})
		}
	})
	if got := virsh(t, l, "host1", "list", "--all", "--name"); got != "" {
		t.Errorf("domains left: %q", got)
	}
	if left, err := os.ReadDir(l.Storage()); err != nil || len(left) != 0 {
		t.Errorf("files left: %v, %v", left, err)
	}
	down(t, l)
}

// defines has libvirt take a guest's definition and drop it again.
func defines(t *testing.T, l *Lab, spec GuestSpec) {
	t.Helper()
	if err := l.complete(&spec); err != nil {
		t.Fatal(err)
	}
	g, err := l.register(spec)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := prepareLinux(t.Context(), func(what string) { t.Log(what) })
	if err != nil {
		t.Fatal(err)
	}
	definition, err := l.define(t.Context(), &g, boot)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.WithLibvirt(t.Context(), "host1", func(v *libvirt.Libvirt) error {
		_, err := v.DomainDefineXML(string(definition))
		return err
	}); err != nil {
		t.Errorf("%v:\n%s", err, definition)
	}
	if err := l.RemoveGuest(t.Context(), g.Name); err != nil {
		t.Error(err)
	}
}
