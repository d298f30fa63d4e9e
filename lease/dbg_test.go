package lease_test
import "testing"
func TestDbg(t *testing.T) {
	m := &model{}
	_ = m
	defer func() {
	}()
	dbg = true
	runModel(t, 0x4b)
}
