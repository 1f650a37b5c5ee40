package announce

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
)

func native(v ...uint16) (b []byte) {
	for _, x := range v {
		b = binary.NativeEndian.AppendUint16(b, x)
	}
	return b
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestRepack(t *testing.T) {
	ours := []byte{2, 0, 0, 0, 0, 1}
	body := append([]byte{0x88, 0xb5}, make([]byte, 46)...)
	good := join(guestMAC, otherMAC, body)
	sent := join(guestMAC, ours, body)
	plain := make([]byte, 10)
	hdr := func(flags, gso byte, rest ...uint16) []byte { return join([]byte{flags, gso}, native(rest...)) }
	tests := []struct {
		name string
		in   []byte
		want []byte
		err  error
	}{
		{"plain", join(plain, good), join(plain, sent), nil},
		{"data valid is not passed on", join(hdr(2, 0, 0, 0, 0, 0), good), join(plain, sent), nil},
		{"checksum", join(hdr(1, 0, 0, 0, 34, 6), good), join(hdr(1, 0, 0, 0, 34, 6), sent), nil},
		{"segments", join(hdr(1, 0x81, 54, 10, 34, 16), good), join(hdr(1, 0x81, 54, 10, 34, 16), sent), nil},
		{"checksum outside", join(hdr(1, 0, 0, 0, 34, 27), good), nil, errMalformed},
		{"checksum in the Ethernet header", join(hdr(1, 0, 0, 0, 12, 0), good), nil, errMalformed},
		{"segments without checksum", join(hdr(0, 1, 54, 10, 0, 0), good), nil, errMalformed},
		{"segments of no size", join(hdr(1, 1, 54, 0, 34, 16), good), nil, errMalformed},
		{"broadcast", join(plain, bytes.Repeat([]byte{0xff}, 6), otherMAC, body), nil, errNotForIt},
		{"multicast", join(plain, []byte{0x33, 0x33, 0, 0, 0, 1}, otherMAC, body), nil, errNotForIt},
		{"to another", join(plain, otherMAC, otherMAC, body), nil, errNotForIt},
		{"from the guest", join(plain, guestMAC, guestMAC, body), nil, errNotForIt},
		{"from a group", join(plain, guestMAC, []byte{1, 0, 0, 0, 0, 0}, body), nil, errNotForIt},
		{"cut short", join(plain, good[:13]), nil, errMalformed},
		{"empty", nil, nil, errMalformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := repack(bytes.Clone(tt.in), guestMAC, ours)
			if !errors.Is(err, tt.err) || !bytes.Equal(got, tt.want) {
				t.Errorf("got %x, %v\nwant %x, %v", got, err, tt.want, tt.err)
			}
		})
	}
}

func TestTag(t *testing.T) {
	head := join(guestMAC, otherMAC)
	rest := append([]byte{0x08, 0x00}, make([]byte, 46)...)
	hdr := join([]byte{1, 1}, native(54, 1000, 34, 16))
	moved := join([]byte{1, 1}, native(58, 1000, 38, 16))
	in := join(hdr, head, rest)
	if got, want := tag(in, 10), join(moved, head, []byte{0x81, 0, 0, 10}, rest); !bytes.Equal(got, want) {
		t.Errorf("got %x\nwant %x", got, want)
	}
	if got := tag(in, 0); !bytes.Equal(got, in) {
		t.Errorf("no VLAN: got %x", got)
	}
	tagged := tag(in, 10)
	if got := tag(tagged, 20); !bytes.Equal(got, tagged) {
		t.Errorf("tagged twice: %x", got)
	}
}

func TestWithTag(t *testing.T) {
	in := join(make([]byte, 10), guestMAC, otherMAC, []byte{8, 0}, make([]byte, 46))
	aux := func(status uint32, control, protocol uint16) []byte {
		return join(binary.NativeEndian.AppendUint32(nil, status), make([]byte, 12), native(control, protocol))
	}
	tagged := func(tag ...byte) []byte { return join(in[:22], tag, in[22:]) }
	tests := []struct {
		name string
		aux  []byte
		want []byte
	}{
		{"none", aux(1, 7, 0x88a8), in},
		{"priority and all", aux(0x10, 0x6007, 0), tagged(0x81, 0, 0x60, 7)},
		{"other protocol", aux(0x50, 7, 0x88a8), tagged(0x88, 0xa8, 0, 7)},
		{"cut short", aux(0x10, 7, 0)[:19], in},
	}
	for _, tt := range tests {
		if got := withTag(in, tt.aux); !bytes.Equal(got, tt.want) {
			t.Errorf("%s: got %x\nwant %x", tt.name, got, tt.want)
		}
	}
	if got := withTag(in[:23], aux(0x10, 7, 0)); len(got) != 23 {
		t.Errorf("no frame: %x", got)
	}
}

func FuzzRepack(f *testing.F) {
	good := join(guestMAC, otherMAC, []byte{8, 0}, make([]byte, 46))
	f.Add(join(make([]byte, 10), good), make([]byte, 20))
	f.Add(join([]byte{1, 1}, native(54, 1000, 34, 16), good), bytes.Repeat([]byte{0xff}, 20))
	f.Fuzz(func(t *testing.T, b, aux []byte) {
		in := bytes.Clone(withTag(b, aux))
		out, err := repack(bytes.Clone(in), guestMAC, otherMAC)
		if err != nil {
			return
		}
		if len(out) != len(in) {
			t.Fatalf("%d bytes became %d", len(in), len(out))
		}
		eth := out[offloadHeader:]
		if !bytes.Equal(eth[:6], guestMAC) || !bytes.Equal(eth[6:12], otherMAC) || !bytes.Equal(eth[12:], in[offloadHeader+12:]) {
			t.Fatalf("the frame changed: %x", eth)
		}
		if tagged := tag(out, 10); len(tagged) != len(out) && len(tagged) != len(out)+4 {
			t.Fatalf("tagging made %d bytes of %d", len(tagged), len(out))
		}
	})
}
