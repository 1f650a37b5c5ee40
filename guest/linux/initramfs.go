package linux

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"crypto/sha256"

	"github.com/cavaliergopher/cpio"
)

// Boot is what a Linux guest boots from.
type Boot struct {
	Kernel string // path, for QEMU's -kernel
	Initrd string // path, for QEMU's -initrd
}

// Console is what belongs on a guest's kernel command line, besides its
// control.Settings.
const Console = "console=ttyS0 quiet loglevel=4"

// Prepare returns what guests boot from, made in a cache folder if it is not
// there yet, of this init program. say is told about what may take long.
func Prepare(ctx context.Context, cache string, init []byte, say func(string)) (Boot, error) {
	k, err := FetchKernel(ctx, cache, say)
	if err != nil {
		return Boot{}, err
	}
	var archive bytes.Buffer
	if err := WriteInitramfs(&archive, k, init); err != nil {
		return Boot{}, err
	}
	sum := sha256.Sum256(archive.Bytes())
	path := filepath.Join(cache, "initramfs", hex.EncodeToString(sum[:8])+".cpio.gz")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		err = writeWhole(path, archive.Bytes())
		if err != nil {
			return Boot{}, fmt.Errorf("initramfs: %w", err)
		}
	} else if err != nil {
		return Boot{}, fmt.Errorf("initramfs: %w", err)
	}
	return Boot{Kernel: k.Image, Initrd: path}, nil
}

// writeWhole makes a file that is never seen half-written.
func writeWhole(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// WriteInitramfs writes a compressed initramfs: init as /init, and the kernel's
// modules. The same input gives the same bytes.
func WriteInitramfs(w io.Writer, k Kernel, init []byte) error {
	// The guest unpacks it on an emulated CPU, from memory: fast counts for
	// more than small.
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	a := archive{w: cpio.NewWriter(z)}
	for _, dir := range []string{"dev", "proc", "sys", "modules"} {
		a.add(dir, cpio.TypeDir|0o755, nil)
	}
	a.add("init", cpio.TypeReg|0o755, init)
	order, err := os.ReadFile(filepath.Join(k.Modules, "order"))
	if err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	a.add("modules/order", cpio.TypeReg|0o644, order)
	for _, name := range strings.Fields(string(order)) {
		b, err := os.ReadFile(filepath.Join(k.Modules, filepath.Base(name)))
		if err != nil {
			return fmt.Errorf("initramfs: %w", err)
		}
		a.add("modules/"+filepath.Base(name), cpio.TypeReg|0o644, b)
	}
	if err := errors.Join(a.err, a.w.Close(), z.Close()); err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	return nil
}

// archive adds files until the first error, which it keeps.
type archive struct {
	w   *cpio.Writer
	n   int64
	err error
}

func (a *archive) add(name string, mode cpio.FileMode, content []byte) {
	if a.err != nil {
		return
	}
	a.n++
	h := &cpio.Header{Name: name, Mode: mode, Size: int64(len(content)), Inode: a.n, Links: 1}
	if a.err = a.w.WriteHeader(h); a.err == nil {
		_, a.err = a.w.Write(content)
	}
}
