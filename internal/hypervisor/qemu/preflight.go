package qemu

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/internal/hypervisor"
	"github.com/lmctl/lmctl/internal/hypervisor/storage"
	"github.com/lmctl/lmctl/internal/sys"
	"github.com/lmctl/lmctl/migrate"
)

// Examine compares this host with what the offered guest needs and leaves
// nothing. What only shows when its QEMU has started is not known before
// Prepare: whether the CPU is the same.
func (d *Driver) Examine(ctx context.Context, offer migrate.Offer) (hypervisor.Checks, error) {
	var checks hypervisor.Checks
	b, def, err := parseBundle(offer.Definition)
	if err != nil {
		checks.Fail("definition", fmt.Sprintf("the guest's description cannot be read: %v", err), "")
		return checks, nil
	}
	if err := matchOffer(offer, def); err != nil {
		checks.Err("definition", err)
		return checks, nil
	}
	_, checks = d.examine(ctx, b, def)
	return checks, nil
}

// matchOffer checks that the description is that of the guest on offer, and that
// the guest can come in the mode on offer.
func matchOffer(offer migrate.Offer, def *Definition) error {
	if offer.Mode == migrate.Relay {
		return refusal("guests without libvirt come here in direct mode only; leave the mode to lmctl")
	}
	if def.Name != offer.Guest || def.UUID != offer.UUID {
		return refusal("the description is of guest %s (%s), the offer of %q (%q)", def.Name, def.UUID, offer.Guest, offer.UUID)
	}
	return nil
}

// matchBlocks checks that the memory on offer is that of the description.
func matchBlocks(offer migrate.Offer, def *Definition) error {
	if len(offer.Blocks) != 1 || offer.Blocks[0].Name != memoryBackend || offer.Blocks[0].Size != int64(def.Memory) {
		return refusal("the offered memory is %v, the description's one block %s of %d bytes", offer.Blocks, memoryBackend, int64(def.Memory))
	}
	return nil
}

// examine compares this host with what the guest needs. Where nothing fails,
// run is how it would be started.
func (d *Driver) examine(ctx context.Context, b *bundle, def *Definition) (run *runRecord, c hypervisor.Checks) {
	run = &runRecord{Machine: b.Machine, Accelerator: b.Accelerator, CPU: b.CPU}
	bin, err := d.bins.get(ctx, def)
	if err != nil {
		c.Err("QEMU", err)
	} else {
		run.QEMU, run.FirmwareDir, run.Version, run.Started = bin.Path, bin.Firmware, bin.Version, time.Now()
		c.Pass("QEMU", "version %s (%s), %s at the source", bin.Version, bin.Path, b.QEMU)
		examineMachine(&c, bin, b)
	}
	examineAccelerator(&c, b)
	if b.PageSize == pageSize {
		c.Pass("page size", "%d bytes, as at the source", pageSize)
	} else {
		c.Fail("page size", fmt.Sprintf("pages have %d bytes here and %d at the source", pageSize, b.PageSize), "both hosts need the same")
	}
	d.examineMemory(&c, int64(def.Memory))
	c.Add(storage.Compare(gatherFiles(def), b.Files))
	for _, bridge := range def.bridges() {
		if _, err := d.checkBridge(bridge); err != nil {
			c.Err("bridge "+bridge, err)
		} else {
			c.Pass("bridge "+bridge, "it is here")
		}
	}
	d.examineNames(&c, def)
	return run, c
}

func examineMachine(c *hypervisor.Checks, bin *qemuBinary, b *bundle) {
	if bin.Machines[b.Machine] {
		c.Pass("machine type", "%s", b.Machine)
		return
	}
	c.Fail("machine type", fmt.Sprintf("QEMU %s of this host (%s) has no machine type %s", bin.Version, bin.Path, b.Machine),
		fmt.Sprintf("install QEMU %s or later, or start the guest with an older machine type", b.QEMU))
}

func examineAccelerator(c *hypervisor.Checks, b *bundle) {
	if b.Accelerator != AcceleratorKVM {
		c.Pass("accelerator", "%s, CPU model %s", b.Accelerator, b.CPU)
		return
	}
	if err := openKVM(); err != nil {
		c.Fail("accelerator", fmt.Sprintf("the guest runs on KVM, which cannot be used here: %v", err), "load the kvm module")
		return
	}
	c.Pass("accelerator", "KVM; the CPU model %s is compared when the guest comes", b.CPU)
}

// examineMemory compares what the guest needs with what is free. The guest's
// holes may never be filled, but nobody can tell now; the same goes for those
// that are on their way here already.
func (d *Driver) examineMemory(c *hypervisor.Checks, need int64) {
	promised := d.promisedMemory()
	_, available, err := sys.Memory()
	switch {
	case err != nil:
		c.Err("memory", err)
	case available-promised-d.cfg.MemoryReserve < need:
		c.Fail("memory", fmt.Sprintf("this host has %s of memory available, of which %s are promised to other guests on their way here and %s stay in reserve, and the guest needs %s",
			roundMiB(available), roundMiB(promised), Size(d.cfg.MemoryReserve), Size(need)), "free some, or choose another host")
	default:
		c.Pass("memory", "%s needed, %s available beyond the reserve", Size(need), roundMiB(available-promised-d.cfg.MemoryReserve))
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(d.cfg.MemoryDir, &fs); err != nil {
		c.Err("memory folder", &os.PathError{Op: "statfs", Path: d.cfg.MemoryDir, Err: err})
		return
	}
	free := int64(fs.Bavail)*fs.Bsize - promised
	switch {
	case fs.Blocks == 0: // a tmpfs without a limit
		c.Pass("memory folder", "%s has no limit", d.cfg.MemoryDir)
	case free < need:
		c.Fail("memory folder", fmt.Sprintf("%s has room for %s, the guest needs %s", d.cfg.MemoryDir, roundMiB(free), Size(need)), "make that tmpfs larger")
	default:
		c.Pass("memory folder", "%s has room for %s", d.cfg.MemoryDir, roundMiB(free))
	}
}

// promisedMemory is what the guests on their way here have not filled yet.
func (d *Driver) promisedMemory() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	var sum int64
	for _, v := range d.guests {
		if v.info().State != hypervisor.StateIncoming {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(v.files.memory, &st); err == nil {
			sum += max(0, int64(v.def.Memory)-st.Blocks*512)
		}
	}
	return sum
}

func roundMiB(n int64) Size { return Size(max(n, 0) &^ (1<<20 - 1)) }

func (d *Driver) examineNames(c *hypervisor.Checks, def *Definition) {
	if i, err := d.Get(def.Name); err == nil {
		c.Fail("name", fmt.Sprintf("there is already a guest named %s on this host (%s, %s)", i.Name, i.UUID, i.State), "remove or rename one of them")
		return
	}
	if i, err := d.Find(def.UUID); err == nil {
		c.Fail("UUID", fmt.Sprintf("guest %s of this host has the same UUID %s", i.Name, i.UUID), "remove one of them")
		return
	}
	c.Pass("name and UUID", "free")
}
