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

var _ migrate.Host = (*Driver)(nil)

// Prepare checks that this host can take the offered guest and makes its
// shell: a QEMU that waits for the guest's state, with all of its memory holes
// and its network not connected. What this host lacks is a *migrate.Refusal
// with every reason. On an error nothing is left.
func (d *Driver) Prepare(ctx context.Context, offer migrate.Offer) (migrate.Shell, error) {
	s, err := d.prepare(ctx, offer)
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (d *Driver) prepare(ctx context.Context, offer migrate.Offer) (*Shell, error) {
	b, def, err := parseBundle(offer.Definition)
	if err != nil {
		return nil, refusal("the guest's description cannot be read: %v", err)
	}
	if offer.Mode == migrate.Relay {
		return nil, refusal("guests without libvirt come here in direct mode only; leave the mode to lmctl")
	}
	if err := matchOffer(offer, def); err != nil {
		return nil, err
	}
	run, reasons := d.examine(ctx, b, def)
	if len(reasons) > 0 {
		return nil, &migrate.Refusal{Reasons: reasons}
	}
	v := d.newVM(def)
	v.rec = record{Run: run, Incoming: true, Cards: b.Cards}
	v.state = hypervisor.StateIncoming
	done, err := v.begin("incoming migration")
	if err != nil {
		return nil, err
	}
	if err := d.add(v); err != nil {
		return nil, refusal("guest %s cannot come here: %v", def.Name, err)
	}
	s, err := v.buildShell(ctx, b, done)
	if err != nil {
		done()
		return nil, fmt.Errorf("prepare guest %s: %w", def.Name, err)
	}
	return s, nil
}

func refusal(format string, args ...any) *migrate.Refusal {
	return &migrate.Refusal{Reasons: []string{fmt.Sprintf(format, args...)}}
}

// matchOffer checks that the description is that of the guest on offer.
func matchOffer(offer migrate.Offer, def *Definition) error {
	switch {
	case def.Name != offer.Guest || def.UUID != offer.UUID:
		return refusal("the description is of guest %s (%s), the offer of %q (%q)", def.Name, def.UUID, offer.Guest, offer.UUID)
	case len(offer.Blocks) != 1 || offer.Blocks[0].Name != memoryBackend || offer.Blocks[0].Size != int64(def.Memory):
		return refusal("the offered memory is %v, the description's one block %s of %d bytes", offer.Blocks, memoryBackend, int64(def.Memory))
	}
	return nil
}

// examine gathers everything for which this host cannot take the guest.
func (d *Driver) examine(ctx context.Context, b *bundle, def *Definition) (*runRecord, []string) {
	var reasons []string
	say := func(err error) {
		if err != nil {
			reasons = append(reasons, err.Error())
		}
	}
	run := &runRecord{Machine: b.Machine, Accelerator: b.Accelerator, CPU: b.CPU}
	bin, err := d.bins.get(ctx, def)
	say(err)
	if err == nil {
		run.QEMU, run.FirmwareDir, run.Version, run.Started = bin.Path, bin.Firmware, bin.Version, time.Now()
		if !bin.Machines[b.Machine] {
			reasons = append(reasons, fmt.Sprintf("QEMU %s of this host (%s) has no machine type %s; install QEMU %s or later, or start the guest with an older machine type",
				bin.Version, bin.Path, b.Machine, b.QEMU))
		}
	}
	if b.Accelerator == AcceleratorKVM {
		if err := openKVM(); err != nil {
			reasons = append(reasons, fmt.Sprintf("the guest runs on KVM, which cannot be used here: %v; load the kvm module", err))
		}
	}
	if b.PageSize != pageSize {
		reasons = append(reasons, fmt.Sprintf("pages have %d bytes here and %d at the source; both hosts need the same", pageSize, b.PageSize))
	}
	reasons = append(reasons, d.examineMemory(int64(def.Memory))...)
	reasons = append(reasons, examineFiles(b, def)...)
	seen := make(map[string]bool)
	for i := range def.NICs {
		if bridge := def.NICs[i].Bridge; !seen[bridge] {
			seen[bridge] = true
			_, err := d.checkBridge(bridge)
			say(err)
		}
	}
	say(d.examineNames(def))
	return run, reasons
}

// examineMemory compares what the guest needs with what is free. The guest's
// holes may never be filled, but nobody can tell now; the same goes for those
// that are on their way here already.
func (d *Driver) examineMemory(need int64) []string {
	var reasons []string
	promised := d.promisedMemory()
	_, available, err := sys.Memory()
	switch {
	case err != nil:
		reasons = append(reasons, err.Error())
	case available-promised-d.cfg.MemoryReserve < need:
		reasons = append(reasons, fmt.Sprintf("this host has %s of memory available, of which %s are promised to other guests on their way here and %s stay in reserve, and the guest needs %s; free some, or choose another host",
			roundMiB(available), roundMiB(promised), Size(d.cfg.MemoryReserve), Size(need)))
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(d.cfg.MemoryDir, &fs); err != nil {
		return append(reasons, (&os.PathError{Op: "statfs", Path: d.cfg.MemoryDir, Err: err}).Error())
	}
	// A tmpfs without a limit says that it has no blocks at all.
	if free := int64(fs.Bavail)*fs.Bsize - promised; fs.Blocks > 0 && free < need {
		reasons = append(reasons, fmt.Sprintf("%s has room for %s, the guest needs %s; make that tmpfs larger", d.cfg.MemoryDir, roundMiB(free), Size(need)))
	}
	return reasons
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

// examineFiles compares the files that the guest uses with what the source
// sees.
func examineFiles(b *bundle, def *Definition) []string {
	here, err := gatherFiles(def)
	if err != nil {
		return storage.Reasons(err)
	}
	if len(here) != len(b.Files) {
		return []string{fmt.Sprintf("the source describes %d files, its definition names %d", len(b.Files), len(here))}
	}
	var reasons []string
	for i := range here {
		if here[i].Path != b.Files[i].Path {
			return []string{fmt.Sprintf("the source describes the file %q in the place of %q", b.Files[i].Path, here[i].Path)}
		}
		reasons = append(reasons, here[i].Compare(b.Files[i])...)
	}
	return reasons
}

func (d *Driver) examineNames(def *Definition) error {
	if i, err := d.Get(def.Name); err == nil {
		return fmt.Errorf("there is already a guest named %s on this host (%s, %s); remove or rename one of them", i.Name, i.UUID, i.State)
	}
	if i, err := d.Find(def.UUID); err == nil {
		return fmt.Errorf("guest %s of this host has the same UUID %s; remove one of them", i.Name, i.UUID)
	}
	return nil
}
