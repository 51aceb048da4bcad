// Replaces the header of OpenCV that includes all of its modules.
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
