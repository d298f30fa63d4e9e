package vmfs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"basalt/block"
	"basalt/vmfs"
)

// worker plays one user of the volume, who owns the names that end in its number:
// it knows what they are, while the folders that hold them, and one fought-over
// name, are everybody's.
type worker struct {
	t     *testing.T
	v     *vmfs.Volume
	id    int
	rng   *rand.Rand
	files map[string]int // length by path
}

var sharedFolders = []string{"/a", "/b", "/a/c"}

func (w *worker) path() string {
	return fmt.Sprintf("%s/%d.%d", sharedFolders[w.rng.IntN(len(sharedFolders))], w.rng.IntN(4), w.id)
}

func (w *worker) step(ctx context.Context) error {
	path := w.path()
	size, have := w.files[path]
	switch w.rng.IntN(6) {
	case 0, 1:
		n := w.rng.IntN(20000)
		if w.rng.IntN(4) == 0 {
			n += 1 << 20
		}
		err := put(ctx, w.v, path, n, byte(w.id))
		if have != errors.Is(err, vmfs.ErrExists) || err != nil && !have {
			return fmt.Errorf("put %s, exists %v: %w", path, have, err)
		}
		if !have {
			w.files[path] = n
		}
	case 2:
		err := w.v.Remove(ctx, path)
		if have == errors.Is(err, vmfs.ErrNotFound) || err != nil && have {
			return fmt.Errorf("remove %s, exists %v: %w", path, have, err)
		}
		delete(w.files, path)
	case 3:
		to := w.path()
		_, taken := w.files[to]
		err := w.v.Rename(ctx, path, to)
		switch {
		case !have && !errors.Is(err, vmfs.ErrNotFound), have && taken && !errors.Is(err, vmfs.ErrExists), have && !taken && err != nil:
			return fmt.Errorf("rename %s to %s, %v %v: %w", path, to, have, taken, err)
		case have && !taken:
			delete(w.files, path)
			w.files[to] = size
		}
	case 4:
		var got bytes.Buffer
		err := w.v.Get(ctx, path, &got, nil)
		if have == errors.Is(err, vmfs.ErrNotFound) || err != nil && have {
			return fmt.Errorf("get %s, exists %v: %w", path, have, err)
		}
		if have && !bytes.Equal(got.Bytes(), pattern(size, byte(w.id))) {
			return fmt.Errorf("%s: %d bytes read back differ from the %d written", path, got.Len(), size)
		}
	case 5:
		err := w.v.Mkdir(ctx, "/a/fight")
		if err == nil || errors.Is(err, vmfs.ErrExists) {
			err = w.v.Remove(ctx, "/a/fight")
		}
		if err != nil && !is(err, vmfs.ErrNotFound, vmfs.ErrHeld) {
			return fmt.Errorf("fight: %w", err)
		}
	}
	return nil
}

// Several hosts with several users each do as they like; everyone finds his files
// as he left them, and the volume is in order in the end. A check that runs beside
// them reports no damage and no leak.
func TestManyUsersOfManyHostsAgreeWithTheirModels(t *testing.T) {
	const hosts, users, steps = 3, 3, 25
	lun := newLUN(t, 256<<20, 512)
	var vols []*vmfs.Volume
	for h := range hosts {
		vols = append(vols, mount(t, lun, fmt.Sprintf("h%d", h)))
	}
	for _, f := range sharedFolders {
		if err := vols[0].Mkdir(t.Context(), f); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	workers := make([]*worker, hosts*users)
	for i := range workers {
		w := &worker{t: t, v: vols[i%hosts], id: i, rng: rand.New(rand.NewPCG(uint64(i), 5)), files: map[string]int{}}
		workers[i] = w
		wg.Go(func() {
			for n := range steps {
				if err := w.step(t.Context()); err != nil {
					t.Errorf("user %d, step %d: %v", w.id, n, err)
					return
				}
			}
		})
	}
	done := make(chan struct{})
	var checks sync.WaitGroup
	checks.Go(func() {
		v := mount(t, lun, "checker")
		defer func() {
			if err := v.Close(context.Background()); err != nil {
				t.Error(err)
			}
		}()
		for {
			r, err := v.Check(t.Context(), diskSlabs)
			if err != nil {
				t.Error(err)
				return
			}
			for _, f := range r.Findings {
				if f.Severity > vmfs.Note {
					t.Errorf("beside the users, check finds %v: %s: %s", f.Severity, f.Where, f.What)
				}
			}
			select {
			case <-done:
				return
			default:
			}
		}
	})
	wg.Wait()
	close(done)
	checks.Wait()
	want := map[string]bool{}
	for _, w := range workers {
		for path := range w.files {
			want[path[1:]] = true
		}
	}
	for path, what := range tree(t, vols[0]) {
		if what != vmfs.KindFolder.String() && !want[path] {
			t.Errorf("%s is nobody's", path)
		}
		delete(want, path)
	}
	if len(want) != 0 {
		t.Errorf("lost: %v", want)
	}
	for _, v := range vols {
		if err := v.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	wantClean(t, lun.Host("check"), vmfs.Note)
}

// Two hosts that put a file of one name at once make one file, whole.
func TestOneOfTwoPutsOfANameWins(t *testing.T) {
	lun := newLUN(t, 128<<20, 512)
	a, b := mount(t, lun, "a"), mount(t, lun, "b")
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, v := range []*vmfs.Volume{a, b} {
		wg.Go(func() { errs[i] = put(t.Context(), v, "/f", 3<<20+1+i, byte(i)) })
	}
	wg.Wait()
	won := 0
	if errs[0] != nil {
		won = 1
	}
	if errs[won] != nil || !errors.Is(errs[1-won], vmfs.ErrExists) {
		t.Fatalf("%v and %v", errs[0], errs[1])
	}
	var got bytes.Buffer
	if err := a.Get(t.Context(), "/f", &got, nil); err != nil || !bytes.Equal(got.Bytes(), pattern(3<<20+1+won, byte(won))) {
		t.Errorf("%d bytes read back (%v)", got.Len(), err)
	}
	if n := used(t, a); n != 4<<20 {
		t.Errorf("%d bytes are used", n)
	}
	for _, v := range []*vmfs.Volume{a, b} {
		if err := v.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	wantClean(t, lun.Host("check"), vmfs.Note)
}

// Two hosts that need more object slots at once extend the table once.
func TestHostsExtendTheTableAtOnce(t *testing.T) {
	p := prepare(t, scenarios()[len(scenarios())-1])
	lun := p.lun.Clone()
	var wg sync.WaitGroup
	var vols []*vmfs.Volume
	for h := range 3 {
		vols = append(vols, mount(t, lun, fmt.Sprintf("h%d", h)))
	}
	for h, v := range vols {
		wg.Go(func() {
			for i := range 3 {
				if err := v.Mkdir(t.Context(), fmt.Sprintf("/n%d-%d", h, i)); err != nil {
					t.Error(err)
				}
			}
			if err := v.Close(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	wantClean(t, lun.Host("check"), vmfs.Note)
	v := mount(t, lun, "last")
	if have := tree(t, v); len(have) != len(p.before)+9 {
		t.Errorf("%d folders, want %d", len(have), len(p.before)+9)
	}
	if err := v.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// A creation that needs a longer object table lets its folder go while it waits for
// the volume lock: its holder, who moves a folder, may be waiting for that one.
// Guards the order of locks in inFolder.
func TestExtensionDoesNotWaitWithAFolderInHand(t *testing.T) {
	p := prepare(t, scenarios()[len(scenarios())-1])
	inSite(t, p.lun, func(x *site) {
		ctx := x.t.Context()
		a := x.mount("a")
		d := &meddler{within: block.Range{OffBytes: objectAt(1), LenBytes: 512}}
		b := x.mountMeddled("b", d)
		created := make(chan error, 1)
		d.before = func() { // b has the volume lock and is about to lock the root folder
			go func() { created <- p.run(ctx, a.Volume) }()
			waitFor(x, 20*time.Millisecond)
		}
		begin := x.clk.Now()
		if err := b.Rename(ctx, "/"+long(0), "/"+long(1)+"/moved"); err != nil {
			x.t.Error(err)
		}
		if err := <-created; err != nil {
			x.t.Error(err)
		}
		if d.before != nil {
			x.t.Error("nobody meddled")
		}
		if took := x.clk.Now().Sub(begin); took > 5*time.Second {
			x.t.Errorf("they waited %v for each other", took)
		}
	})
}
