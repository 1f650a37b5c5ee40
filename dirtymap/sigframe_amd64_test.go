package dirtymap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// layout is the standard format of a processor with AVX (component 2), AVX-512
// (5 to 7), protection keys (9) and AMX tile data (18), as Intel lays it out.
func layout(i int) (off, size int) {
	switch i {
	case 2:
		return 576, 256
	case 5:
		return 1088, 64
	case 6:
		return 1152, 512
	case 7:
		return 1664, 1024
	case 9:
		return 2688, 8
	case 18:
		return 2816, 8192
	}
	return 0, 0
}

func TestFPState(t *testing.T) {
	const avx, keys, amx = 1 << 2, 1 << 9, 1 << 18
	for _, c := range []struct {
		name           string
		enabled, inUse uint64
		size           int
		bits           uint64
	}{
		{"nothing but SSE", 3 | avx, 0, 576, 3},
		{"AVX", 3 | avx, 3 | avx, 832, 3 | avx},
		{"keys are always there", 3 | avx | keys, 3, 2696, 3 | keys},
		{"tiles not in use", 3 | avx | keys | amx, 3 | avx, 2696, 3 | avx | keys},
		{"tiles in use", 3 | avx | keys | amx, 3 | amx, 11008, 3 | keys | amx},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := make([]byte, 11008)
			for i := range x {
				x[i] = byte(i)
			}
			le := binary.LittleEndian
			le.PutUint64(x[xsaveSoftware:], c.enabled)
			le.PutUint64(x[xsaveHeader:], c.inUse)
			fp, err := fpState(x, layout)
			if err != nil {
				t.Fatal(err)
			}
			sw := fp[xsaveSoftware:]
			if len(fp) != c.size+4 || le.Uint32(fp[c.size:]) != fpMagic2 || le.Uint32(sw) != fpMagic1 ||
				le.Uint32(sw[4:]) != uint32(len(fp)) || le.Uint64(sw[8:]) != c.bits || le.Uint32(sw[16:]) != uint32(c.size) {
				t.Errorf("%d bytes, software bytes %x", len(fp), sw[:48])
			}
			if got := le.Uint64(fp[xsaveHeader:]); got != c.bits {
				t.Errorf("in use: %#x, want %#x", got, c.bits)
			}
			if !bytes.Equal(fp[:xsaveSoftware], x[:xsaveSoftware]) || !bytes.Equal(fp[xsaveHeader+8:c.size], x[xsaveHeader+8:c.size]) {
				t.Error("the state itself was changed")
			}
		})
	}
	if _, err := fpState(make([]byte, 512), layout); !errors.Is(err, ErrUnsupported) {
		t.Errorf("without XSAVE: %v", err)
	}
	short := make([]byte, 600)
	binary.LittleEndian.PutUint64(short[xsaveHeader:], avx)
	if _, err := fpState(short, layout); err == nil {
		t.Error("a component beyond the end was accepted")
	}
}

func TestSignalFrame(t *testing.T) {
	regs := unix.PtraceRegs{
		R8: 8, R9: 9, R10: 10, R11: 11, R12: 12, R13: 13, R14: 14, R15: 15,
		Rdi: 20, Rsi: 21, Rbp: 22, Rbx: 23, Rdx: 24, Rax: 25, Rcx: 26, Rsp: 0x7ffe1238, Rip: 28, Eflags: 29,
		Cs: 0x33, Ss: 0x2b,
	}
	fp := bytes.Repeat([]byte{0xfe}, 836)
	addr, frame := signalFrame(&regs, 0xabcd, fp, 0x4444)
	le := binary.LittleEndian
	fpAddr := le.Uint64(frame[frameFPState:])
	if fpAddr%64 != 0 || fpAddr+uint64(len(fp)) > regs.Rsp-redZone || addr+uint64(len(frame)) > regs.Rsp-redZone {
		t.Errorf("frame at %#x+%#x, FPU state at %#x, stack pointer %#x", addr, len(frame), fpAddr, regs.Rsp)
	}
	if !bytes.Equal(frame[fpAddr-addr:], fp) || fpAddr-addr < frameSize {
		t.Error("the FPU state is not where the frame says")
	}
	if le.Uint64(frame) != 0x4444 || le.Uint64(frame[frameSigmask:]) != 0xabcd {
		t.Errorf("return address %#x, mask %#x", le.Uint64(frame), le.Uint64(frame[frameSigmask:]))
	}
	want := []uint64{8, 9, 10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 24, 25, 26, 0x7ffe1238, 28, 29}
	for i, w := range want {
		if got := le.Uint64(frame[frameRegs+8*i:]); got != w {
			t.Errorf("register %d: %#x, want %#x", i, got, w)
		}
	}
	if le.Uint16(frame[frameSegs:]) != 0x33 || le.Uint16(frame[frameSegs+6:]) != 0x2b {
		t.Errorf("segments %x", frame[frameSegs:frameSegs+8])
	}
}

func TestResumeRegs(t *testing.T) {
	neg := func(n int64) uint64 { return uint64(-n) }
	for _, c := range []struct {
		name           string
		orig, rax      uint64
		wantRax, moved uint64
	}{
		{"in user mode", neg(1), 7, 7, 0},
		{"in user mode, by chance like an error", neg(1), neg(eRestartSys), neg(eRestartSys), 0},
		{"call done", 271, 3, 3, 0},
		{"call failed", 271, neg(int64(unix.EINTR)), neg(int64(unix.EINTR)), 0},
		{"ppoll", 271, neg(eRestartNoHand), 271, 2},
		{"read", 0, neg(eRestartSys), 0, 2},
		{"futex", 202, neg(eRestartNoIntr), 202, 2},
		{"nanosleep", 35, neg(eRestartBlock), nrRestartSyscall, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := resumeRegs(unix.PtraceRegs{Orig_rax: c.orig, Rax: c.rax, Rip: 1000, Rdi: 5})
			if got.Rax != c.wantRax || got.Rip != 1000-c.moved || got.Orig_rax != neg(1) || got.Rdi != 5 {
				t.Errorf("rax %#x, rip %d, orig_rax %#x", got.Rax, got.Rip, got.Orig_rax)
			}
		})
	}
}
