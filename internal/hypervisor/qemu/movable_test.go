package qemu

import (
	"errors"
	"strings"
	"testing"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/migrate"
)

func TestMovable(t *testing.T) {
	tests := []struct {
		name, more string
		discards   bool
		want       []string // none: it can be moved
	}{
		{name: "plain"},
		{name: "balloon", more: "extra-arguments: [-device, virtio-balloon-pci]\n", discards: true},
		{
			name: "shared memory with others", want: []string{"the memory shm0 (memory-backend-ram) is not in the guest's memory file", "(ivshmem-plain) cannot be moved", "other processes of this host"},
			more: "extra-arguments: [-object, 'memory-backend-ram,id=shm0,size=1M,share=on', -device, 'ivshmem-plain,memdev=shm0,id=iv']\n",
		},
		{
			name: "private memory", want: []string{"the memory extra (memory-backend-ram) is not in the guest's memory file; take it out of extra-arguments"},
			more: "extra-arguments: [-object, 'memory-backend-ram,id=extra,size=1M']\n",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHost(t)
			h.startSector(t, idleSector, test.more)
			g := h.source(t, "sector")
			err := g.Movable(testContext(t))
			var refusal *migrate.Refusal
			if len(test.want) == 0 && err != nil {
				t.Errorf("Movable: %v", err)
			}
			if len(test.want) > 0 && !errors.As(err, &refusal) {
				t.Fatalf("Movable: %v, not a refusal", err)
			}
			for _, w := range test.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("Movable: %v\nwant: %s", err, w)
				}
			}
			if d, err := g.Discards(testContext(t)); err != nil || d != test.discards {
				t.Errorf("Discards: %v, %v", d, err)
			}
		})
	}
}

// The devices that no test machine has.
func TestWhyUnmovable(t *testing.T) {
	for kind, forbidden := range map[string]bool{
		"vfio-pci": true, "vfio-pci-nohotplug": true, "vhost-user-blk-pci": true, "vhost-user-fs-pci": true, "vhost-vdpa-device-pci": true,
		"ivshmem-doorbell": true, "tpm-tis": true, "tpm-crb": true, "usb-host": true, "pc-dimm": true, "nvdimm": true, "virtio-mem-pci": true,
		"virtio-blk-pci": false, "virtio-net-pci": false, "ide-hd": false, "e1000": false, "virtio-rng-pci": false, "vhost-vsock-pci": false,
	} {
		if got := whyUnmovable(kind) != ""; got != forbidden {
			t.Errorf("%s is forbidden: %v", kind, got)
		}
	}
	var c hypervisor.Checks
	examineArguments([]string{"-netdev", "vhost-vdpa,vhostdev=/dev/vhost-vdpa-0,id=n", "--netdev", `{"type":"vhost-user","id":"m","chardev":"c"}`, "-device", "x"}, &c)
	if len(c) != 2 || c.OK() {
		t.Errorf("checks: %+v", c)
	}
}
